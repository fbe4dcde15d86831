"""Any layout to any other: bit-equal, model and optimizer state."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ckpt_cases import save_fsdp_over_tp
from ckpt_layouts import STEP, Layout, layouts, load_laid_out, save_laid_out, whole_state
from ranks import Ranks
from titan_ckpt import open_checkpoint, verify


def every_pair(groups: dict[int, Ranks], folder: Path, saved: Sequence[Layout], loaded: Sequence[Layout]) -> None:
    folders = {(kind, world): folder / f"{kind} on {world}" for kind, world in saved}
    for world in sorted({world for _, world in saved}):
        kinds = [kind for kind, n in saved if n == world]
        cases = [(folders[kind, world], kind, place % 2 == 0) for place, kind in enumerate(kinds)]
        groups[world].run(save_laid_out, cases, timeout=300)
    for path in folders.values():
        assert holds_whole(path / f"step-{STEP:08d}"), path.name
    for world in sorted({world for _, world in loaded}):
        kinds = [kind for kind, n in loaded if n == world]
        for rank, wrong in enumerate(groups[world].run(load_laid_out, list(folders.values()), kinds, timeout=900)):
            assert not wrong, f"rank {rank} of {world}"


def holds_whole(path: Path) -> bool:
    """Gathered, it is what was saved, bit for bit."""
    assert verify(str(path), level="checksum") == []
    wanted = whole_state()
    with open_checkpoint(str(path)) as opened:
        same = all(torch.equal(opened.read(name), tensor) for name, tensor in wanted.items())
        return same and opened.tensors.keys() == wanted.keys()


@pytest.mark.slow
def test_any_to_any_on_one_to_four_ranks(ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, tmp_path: Path) -> None:
    """Every kind of layout on four ranks is saved, and loaded on fewer; every kind on two is loaded on four."""
    groups = {1: ranks1, 2: ranks2, 4: ranks4}
    every_pair(groups, tmp_path / "down", layouts(4), layouts(1, 2))
    every_pair(groups, tmp_path / "up", layouts(2), layouts(4))


@pytest.mark.nightly
def test_any_to_any_on_one_to_eight_ranks(
    ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, ranks8: Ranks, tmp_path: Path
) -> None:
    groups = {1: ranks1, 2: ranks2, 4: ranks4, 8: ranks8}
    every_pair(groups, tmp_path, layouts(1, 2, 4, 8), layouts(1, 2, 4, 8))


@pytest.mark.slow
def test_what_fsdp_shards_within_tensor_parallel_shards(ranks8: Ranks, tmp_path: Path) -> None:
    """The matrix cuts by hand what does not divide; this is FSDP2's own cut."""
    whole = ranks8.run(save_fsdp_over_tp, tmp_path, timeout=120)[0]
    with open_checkpoint(str(tmp_path / "step-00000001")) as opened:
        for name, weight in whole.items():
            assert torch.equal(opened.read(f"model/{name}"), weight), name
