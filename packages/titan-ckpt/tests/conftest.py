from collections.abc import Iterator

import pytest

from ckpt_group import WorkerGroup


def _group(size: int) -> Iterator[WorkerGroup]:
    group = WorkerGroup(size)
    yield group
    group.close()


@pytest.fixture(scope="session")
def group1() -> Iterator[WorkerGroup]:
    yield from _group(1)


@pytest.fixture(scope="session")
def group2() -> Iterator[WorkerGroup]:
    yield from _group(2)


@pytest.fixture(scope="session")
def group4() -> Iterator[WorkerGroup]:
    yield from _group(4)


@pytest.fixture(scope="session")
def group8() -> Iterator[WorkerGroup]:
    yield from _group(8)
