"""One loss and one set of initial weights, whatever the layout; and a run that changes its layout on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity import assert_same_training
from ranks import Ranks
from train_cases import run_here, tiny


@pytest.fixture(scope="session")
def single(ranks1: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return ranks1.run(run_here, tiny(run__folder=str(tmp_path_factory.mktemp("single"))))[0]


def same_curve(result: dict, expected: dict) -> None:
    curve = {key: expected[key] for key in ("losses", "norms")}
    assert_same_training([result], curve, norm_tolerance=1e-4)


def test_ten_steps_of_one_process(single: dict) -> None:
    assert list(single["losses"]) == list(range(1, 11))
    assert single["losses"][1] - single["losses"][10] > 0.2
    assert single["initial"] != single["final"]


def test_two_processes_fsdp(ranks2: Ranks, single: dict, tmp_path: Path) -> None:
    for result in ranks2.run(run_here, tiny(run__folder=str(tmp_path))):
        assert result["initial"] == single["initial"]
        same_curve(result, single)


def test_two_processes_tp(ranks2: Ranks, single: dict, tmp_path: Path) -> None:
    for result in ranks2.run(run_here, tiny(run__folder=str(tmp_path), parallel__tp="2")):
        assert result["initial"] == single["initial"]
        same_curve(result, single)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            {"parallel__dp_replicate": "2", "parallel__activation_checkpointing": "selective"},
            marks=pytest.mark.nightly,
        ),
        {"parallel__tp": "2", "parallel__sequence_parallel": "false", "training__microbatch_size": "2"},
        pytest.param({"parallel__tp": "4"}, marks=pytest.mark.nightly),
    ],
    ids=["hsdp-ac", "fsdp-tp-no-sp-accumulating", "tp"],
)
def test_four_processes(ranks4: Ranks, single: dict, tmp_path: Path, layout: dict[str, str]) -> None:
    for result in ranks4.run(run_here, tiny(run__folder=str(tmp_path), **layout)):
        assert result["initial"] == single["initial"]
        same_curve(result, single)


@pytest.mark.slow
def test_bfloat16_learns_with_float32_weights(ranks1: Ranks, ranks2: Ranks, single: dict, tmp_path: Path) -> None:
    alone = ranks1.run(run_here, tiny(run__folder=str(tmp_path / "1"), training__dtype="bfloat16"))[0]
    split = ranks2.run(run_here, tiny(run__folder=str(tmp_path / "2"), training__dtype="bfloat16"))[0]
    for result in (alone, split):
        assert result["initial"] == single["initial"]
        assert result["losses"] == pytest.approx(single["losses"], abs=0.05)
        assert result["losses"] != single["losses"]


@pytest.mark.slow
def test_masked_documents_change_the_loss_alike_on_all_layouts(
    ranks1: Ranks, ranks2: Ranks, single: dict, tmp_path: Path
) -> None:
    alone = ranks1.run(run_here, tiny(run__folder=str(tmp_path / "1"), data__mask_documents="true"))[0]
    split = ranks2.run(run_here, tiny(run__folder=str(tmp_path / "2"), data__mask_documents="true", parallel__tp="2"))[
        0
    ]
    same_curve(split, alone)


@pytest.mark.slow
def test_normalized_heads(ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, tmp_path: Path) -> None:
    # A head norm's weight is the same on all ranks, of which each sees other heads.
    alone, fsdp, tp, both = (
        group.run(run_here, tiny(run__folder=str(tmp_path / name), model__preset="debug_qwen3", parallel__tp=tp))[0]
        for name, group, tp in (
            ("1", ranks1, "1"),
            ("fsdp", ranks2, "1"),
            ("tp", ranks2, "2"),
            ("fsdp-tp", ranks4, "2"),
        )
    )
    for result in (fsdp, tp, both):
        assert result["initial"] == alone["initial"]
        same_curve(result, alone)


@pytest.mark.slow
def test_resumed_on_other_layouts(ranks1: Ranks, ranks2: Ranks, ranks4: Ranks, single: dict, tmp_path: Path) -> None:
    # 4 steps on 2 x 2 processes, 3 more on one, the rest on tensor-parallel 2: the curve must not show it.
    folder = str(tmp_path)
    first = ranks4.run(
        run_here, tiny(run__folder=folder, parallel__tp="2", training__steps="4", schedule__decay="none")
    )
    second = ranks1.run(run_here, tiny(run__folder=folder, training__steps="7"))
    third = ranks2.run(run_here, tiny(run__folder=folder, parallel__tp="2"))
    assert [r[0]["resumed"] for r in (first, second, third)] == [None, 4, 7]
    curve = first[0]["losses"] | second[0]["losses"] | third[0]["losses"]
    assert curve == pytest.approx(single["losses"], abs=1e-5)
