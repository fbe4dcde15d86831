"""Ctrl-C or a lack of memory at any line: nothing wrong is published, the Checkpointer is usable or refuses."""

from collections import Counter
from pathlib import Path

import pytest

import ckpt_interrupts
from ckpt_interrupts import interrupt_each, lines_of
from ranks import Ranks

# (asynchronous, whether the thread that saves is interrupted instead of the caller's)
WHERE = [(False, False), (True, False), (True, True)]


def on_one_rank(scratch: Path, asynchronous: bool, in_threads: bool, every: int) -> Counter[str]:
    lines = lines_of(scratch / "whole", asynchronous, in_threads)
    assert len(lines) > 200
    outcomes, wrong = interrupt_each(scratch, lines[::every], asynchronous, in_threads)
    print(asynchronous, in_threads, len(lines), outcomes)
    assert not wrong, "\n".join(wrong)
    return outcomes


@pytest.mark.parametrize(("asynchronous", "in_threads"), WHERE)
def test_interrupted_at_some_lines(tmp_path: Path, asynchronous: bool, in_threads: bool) -> None:
    on_one_rank(tmp_path, asynchronous, in_threads, every=101)


@pytest.mark.nightly
@pytest.mark.parametrize(("asynchronous", "in_threads"), WHERE)
def test_interrupted_at_every_line(tmp_path: Path, asynchronous: bool, in_threads: bool) -> None:
    outcomes = on_one_rank(tmp_path, asynchronous, in_threads, every=1)
    assert outcomes["usable"] > 0.3 * outcomes.total()  # the others were interrupted in `close`, or failed in it


def on_two_ranks(ranks2: Ranks, scratch: Path, asynchronous: bool, in_threads: bool, rank: int, every: int) -> None:
    for outcomes, wrong in ranks2.run(
        ckpt_interrupts.among_ranks, scratch, asynchronous, in_threads, rank, every, timeout=3600
    ):
        print(asynchronous, in_threads, rank, outcomes)
        assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("asynchronous", "in_threads"), WHERE)
def test_one_rank_interrupted_at_some_lines(
    ranks2: Ranks, tmp_path: Path, asynchronous: bool, in_threads: bool, rank: int
) -> None:
    on_two_ranks(ranks2, tmp_path, asynchronous, in_threads, rank, every=211)


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("asynchronous", "in_threads"), WHERE)
def test_one_rank_interrupted_at_every_line(
    ranks2: Ranks, tmp_path: Path, asynchronous: bool, in_threads: bool, rank: int
) -> None:
    on_two_ranks(ranks2, tmp_path, asynchronous, in_threads, rank, every=1)
