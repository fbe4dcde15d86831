from collections.abc import Iterator

import pytest

from ckpt_group import WorkerGroup


@pytest.fixture(scope="session")
def group2() -> Iterator[WorkerGroup]:
    group = WorkerGroup(2)
    yield group
    group.close()


@pytest.fixture(scope="session")
def group4() -> Iterator[WorkerGroup]:
    group = WorkerGroup(4)
    yield group
    group.close()
