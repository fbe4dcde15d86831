"""Experts distributed over ranks and split by tensor parallelism: one loss and one balance in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity import assert_same_training
from ranks import Ranks
from titan_train.check import check
from titan_train.config import Config
from titan_train.errors import ConfigError
from train_balance import router_of_parts
from train_cases import run_here, tiny

# A balancing loss that weighs, so that one counted twice shows; a bias that moves; an expert beside the chosen ones.
EXPERTS = {
    "model__preset": "debug_moe",
    "moe__n_experts": "4",
    "moe__ffn_dim": "32",
    "moe__shared_ffn_dim": "48",
    "moe__balance_loss": "0.3",
    "moe__balance_bias_rate": "0.01",
}
EP, TP = {"parallel__ep": "2"}, {"parallel__tp": "2"}


def config(folder: Path, **changes: str) -> Config:
    return tiny(**(EXPERTS | {"run__folder": str(folder)} | changes))


@pytest.fixture(scope="module")
def single(ranks1: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return ranks1.run(run_here, config(tmp_path_factory.mktemp("single")))[0]


def same(results: list[dict], expected: dict) -> None:
    shared = {key: expected[key] for key in ("initial", "losses", "norms", "more", "buffers")}
    assert_same_training(results, shared, norm_tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        EP | {"training__microbatch_size": "2", "parallel__activation_checkpointing": "selective"},
        pytest.param(
            TP | {"parallel__activation_checkpointing": "full", "parallel__sequence_parallel": "false"},
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["ep-accumulating-sac", "tp-no-sp-ac"],
)
def test_two_processes(ranks2: Ranks, single: dict, tmp_path: Path, layout: dict[str, str]) -> None:
    same(ranks2.run(run_here, config(tmp_path, **layout)), single)


@pytest.mark.slow
def test_four_processes(ranks4: Ranks, single: dict, tmp_path: Path) -> None:
    same(ranks4.run(run_here, config(tmp_path, **(EP | TP))), single)


@pytest.mark.nightly
def test_compiled(ranks2: Ranks, single: dict, tmp_path: Path) -> None:
    compiled = {"parallel__compile": "true", "parallel__compile_backend": "aot_eager"}
    same(ranks2.run(run_here, config(tmp_path, **EP, **compiled), timeout=240.0), single)


@pytest.mark.slow
def test_resumed_on_another_layout(ranks1: Ranks, ranks2: Ranks, tmp_path: Path) -> None:
    constant = {"schedule__decay": "none"}
    expected = ranks1.run(run_here, config(tmp_path / "once", **constant))[0]
    ranks2.run(run_here, config(tmp_path / "twice", training__steps="4", **constant, **EP))
    resumed = ranks1.run(run_here, config(tmp_path / "twice", **constant))[0]
    assert resumed["losses"] == pytest.approx({s: x for s, x in expected["losses"].items() if s > 4}, abs=1e-5)
    assert resumed["buffers"] == expected["buffers"]


def test_errors_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[parallel\] ep 3 does not divide the number of experts, 4; .*\[1, 2, 4\]"):
        check(config(tmp_path, parallel__ep="3"), world_size=3)
    with pytest.raises(ConfigError, match=r"\[parallel\] ep=2 requires plan\['experts'\]"):
        check(tiny(parallel__ep="2"), world_size=2)
    with pytest.raises(ConfigError, match=r"tp 8 does not divide .*eighths of an expert's width \(moe.ffn_dim / 8\) 4"):
        check(config(tmp_path, parallel__tp="8"), world_size=8)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_balance_of_sequences_that_ranks_share(ranks2: Ranks, tmp_path: Path, compiled: bool) -> None:
    for off in ranks2.run(router_of_parts, config(tmp_path), compiled):
        assert max(off) < 1e-5
