import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_cases
from ckpt_states import ModelState, OptimizerState, flip_bit, make_model, make_state
from parity import same_bits
from ranks import Ranks
from titan_ckpt import Checkpointer, list_checkpoints, verify

LAYOUTS = ["fsdp", "hsdp", "fsdp x tp", "plain"]


def load_on_one(folder: Path) -> dict[str, Any]:
    model = make_model(3)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, torch.optim.AdamW(model.parameters()))}
    assert Checkpointer(folder).load(state) is not None
    return ckpt_cases.full(state)


@pytest.mark.parametrize(
    "layout", [pytest.param(one, marks=pytest.mark.slow) if one == "hsdp" else one for one in LAYOUTS]
)
def test_saved_on_four_loaded_on_any(ranks4: Ranks, ranks2: Ranks, tmp_path: Path, layout: str) -> None:
    asynchronous = layout != "hsdp"
    expected = ranks4.run(ckpt_cases.save_laid_out, tmp_path, layout, asynchronous)[0]
    assert verify(tmp_path / "step-00000003", level="checksum") == []
    assert same_bits(load_on_one(tmp_path), expected)
    assert same_bits(ranks2.run(ckpt_cases.load_laid_out, tmp_path, "fsdp")[0], expected)
    other = LAYOUTS[(LAYOUTS.index(layout) + 1) % 3]
    assert same_bits(ranks4.run(ckpt_cases.load_laid_out, tmp_path, other)[0], expected)


@pytest.mark.slow
def test_saved_on_one_loaded_on_four(ranks4: Ranks, tmp_path: Path) -> None:
    model = make_model(1)
    optimizer = torch.optim.AdamW(model.parameters())
    ckpt_cases.train(model, optimizer)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
    Checkpointer(tmp_path).save(1, state)
    assert same_bits(ranks4.run(ckpt_cases.load_laid_out, tmp_path, "fsdp x tp")[0], ckpt_cases.full(state))


def test_each_rank_may_own_weights(ranks2: Ranks, tmp_path: Path) -> None:
    message = ranks2.run(ckpt_cases.own_weights_per_rank, tmp_path)
    assert message[0] == message[1]
    assert "unexpected, in the checkpoint but not asked for (1):\n    model/layer1/w" in message[0][0]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("collect", 1),
        ("assign_writes", 0),
        ("begin", 0),
        ("create", 1),
        ("write", 0),
        ("write", 1),
        ("sync", 1),
        ("publish", 0),
        ("rename", 0),
    ],
)
def test_one_rank_fails_and_all_raise(ranks2: Ranks, tmp_path: Path, where: str, rank: int, asynchronous: bool) -> None:
    first, second = ranks2.run(ckpt_cases.one_rank_fails, tmp_path, where, rank, asynchronous)
    assert first == second
    message, *names = first
    assert f"No space in {where}" in message
    assert "could not " in message
    assert (f"rank {rank}: " in message) == (where in ("collect", "create", "write", "sync"))
    assert names == [".lock", "latest", "step-00000001"]


def test_states_that_differ_are_refused(ranks2: Ranks, tmp_path: Path) -> None:
    first, second = ranks2.run(ckpt_cases.states_that_differ, tmp_path)
    assert first == second
    assert 'state["data"]: values that are not tensors differ between rank 1 and rank 0' in first["json"]
    assert 'state["data"]: values that are not tensors differ between rank 1 and rank 0' in first["float"]
    assert "rank 1 saves the entries ['a', 'b1'] but rank 0 saves ['a', 'b0']" in first["names"]
    assert 'rank 1: state["a"]["x"] is a object' in first["leaf"]
    assert "a/x is a DTensor with a Partial placement" in first["partial"]
    assert "tensor a/x is torch.float32 [3] on rank 1 but torch.float32 [2] on rank 0" in first["shape"]
    assert "make up tensor a/x, which is not covered by its chunks: they hold 4 of 8 elements" in first["hole"]
    assert "make up tensor a/x, which is covered twice at [0]" in first["twice"]
    assert "tensors that are not sharded differ between rank 1 and rank 0: a/rng. They are saved" in first["tensor"]
    assert "rank 1 saves step 1 but rank 0 saves step 0" in first["step"]
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]


def test_all_ranks_agree_on_what_is_corrupt(ranks2: Ranks, tmp_path: Path) -> None:
    assert ranks2.run(ckpt_cases.load_what_may_be_corrupt, tmp_path) == [None, None]
    ckpt = Checkpointer(tmp_path)
    for step in (1, 2, 3):
        ckpt.save(step, make_state(step))
    # One file of each size: each falls to another rank.
    flip_bit(tmp_path / "step-00000003" / "tensors-00000-of-00001.safetensors")
    flip_bit(tmp_path / "step-00000002" / "state.json")
    assert ranks2.run(ckpt_cases.load_what_may_be_corrupt, tmp_path) == [1, 1]


def test_loading_fails_on_one_rank(ranks2: Ranks, tmp_path: Path) -> None:
    first, second = ranks2.run(ckpt_cases.loading_fails_on_one_rank, tmp_path)
    assert first == second
    assert "rank 1: KeyError: 'no such thing'" in first


def test_a_mismatch_on_one_rank_is_reported_to_all(ranks2: Ranks, tmp_path: Path) -> None:
    first, second = ranks2.run(ckpt_cases.mismatch_on_one_rank, tmp_path)
    assert first == second
    assert "model/w: float32 [10] in the checkpoint, float32 [11] asked for" in first


def test_a_group_of_some_ranks(ranks4: Ranks, tmp_path: Path) -> None:
    assert ranks4.run(ckpt_cases.half_of_the_ranks, tmp_path) == [[], [], [1, 1], [1, 1]]


def test_many_checkpointers_in_a_row(ranks4: Ranks, tmp_path: Path) -> None:
    left_open = ranks4.run(ckpt_cases.many_checkpointers, tmp_path)
    assert max(left_open) < 8, left_open
    assert [info.step for info in list_checkpoints(tmp_path)] == [6, 7]


def test_one_rank_dies_and_the_other_raises(ranks2: Ranks, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="of one_rank_dies:\nthe process died"):
        ranks2.run(ckpt_cases.one_rank_dies, tmp_path / "checkpoints", tmp_path / "tale")
    assert "a collective failed while saving or loading (did a rank exit?)" in (tmp_path / "tale").read_text()
    assert [info.step for info in list_checkpoints(tmp_path / "checkpoints")] == [1]


def test_ranks_out_of_step_never_read_each_others_messages(ranks2: Ranks, tmp_path: Path) -> None:
    first, second = ranks2.run(ckpt_cases.out_of_step, tmp_path)
    assert first == second
    for message in first:
        assert "the ranks can no longer save or load together" in message
        assert "found the ranks at different places: rank 0 is at exchange" in message
        assert re.search(
            r"rank 0 is at exchange '\d+ collect the state of step'; rank 1 is at exchange '\d+ list'", message
        )
    assert [info.step for info in list_checkpoints(tmp_path)][-1] == 5


def test_ctrl_c_between_exchanges_frees_the_other_ranks(ranks2: Ranks, tmp_path: Path) -> None:
    first, second = ranks2.run(ckpt_cases.interrupted_between_exchanges, tmp_path)
    assert second[0] == "KeyboardInterrupt"
    assert "a collective failed while saving or loading" in first[0]
    assert '"save step 2" was interrupted on this rank by KeyboardInterrupt' in second[1]
    assert "Close this Checkpointer and create a new one on all ranks" in first[1]
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]


def test_ctrl_c_while_a_rank_works_is_told_to_the_others(ranks2: Ranks, tmp_path: Path) -> None:
    first, second = ranks2.run(ckpt_cases.interrupted_while_working, tmp_path)
    assert second == ["KeyboardInterrupt"]
    assert "step 2 was not saved: could not write the tensors" in first[0]
    assert "rank 1: KeyboardInterrupt: " in first[0]
    assert [info.step for info in list_checkpoints(tmp_path)] == [1, 3]
