"""Any layout to any other: bit-equal, model and optimizer state."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ckpt_group import WorkerGroup
from ckpt_layouts import Layout, layouts, load_laid_out, save_laid_out, whole_state
from titan_ckpt import open_checkpoint, verify


def save_all(groups: dict[int, WorkerGroup], folder: Path, saved: Sequence[Layout]) -> dict[Layout, tuple[Path, int]]:
    at = {}
    for seed, (kind, world) in enumerate(saved, 1):
        at[kind, world] = folder / f"{kind} on {world}", seed
        groups[world].run(save_laid_out, *at[kind, world][:1], kind, seed, seed % 2 == 0, timeout=120)
    return at


def every_pair(groups: dict[int, WorkerGroup], folder: Path, saved: Sequence[Layout], loaded: Sequence[Layout]) -> None:
    at = save_all(groups, folder, saved)
    for path, seed in at.values():
        assert holds_whole(path / f"step-{seed:08d}", seed)
    for kind, world in loaded:
        cases = [(path, kind, seed) for path, seed in at.values()]
        for rank, wrong in enumerate(groups[world].run(load_laid_out, cases, timeout=300)):
            assert not wrong, f"rank {rank} of {kind} on {world}"


def holds_whole(path: Path, seed: int) -> bool:
    """Gathered, it is what was saved, to the bit."""
    assert verify(str(path), level="checksum") == []
    wanted = whole_state(seed)
    with open_checkpoint(str(path)) as opened:
        same = all(torch.equal(opened.read(name), tensor) for name, tensor in wanted.items())
        return same and opened.tensors.keys() == wanted.keys()


def test_any_to_any_on_one_to_four_ranks(
    group1: WorkerGroup, group2: WorkerGroup, group4: WorkerGroup, tmp_path: Path
) -> None:
    groups = {1: group1, 2: group2, 4: group4}
    every_pair(groups, tmp_path, layouts(1, 2, 4), layouts(1, 2, 4))


@pytest.mark.slow
def test_any_to_any_with_eight_ranks(
    group1: WorkerGroup, group2: WorkerGroup, group4: WorkerGroup, group8: WorkerGroup, tmp_path: Path
) -> None:
    groups = {1: group1, 2: group2, 4: group4, 8: group8}
    every_pair(groups, tmp_path / "from", layouts(8), layouts(1, 2, 4, 8))
    every_pair(groups, tmp_path / "to", layouts(1, 2, 4), layouts(8))
