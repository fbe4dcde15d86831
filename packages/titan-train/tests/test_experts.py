"""Mixtures of experts: one loss and one balance over layouts, resumed bit for bit, reported."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from parity import assert_same_training
from ranks import Ranks
from titan_train.check import check
from titan_train.config import Config
from titan_train.errors import ConfigError
from train_cases import run_here, tiny

# A large balancing loss, so that a wrong num_target_tokens shows; and a bias that moves.
EXPERTS = {
    "model__preset": "debug_moe",
    "moe__n_experts": "4",
    "moe__ffn_dim": "32",
    "moe__balance_loss": "0.3",
    "moe__balance_bias_rate": "0.01",
}


def config(folder: Path, **changes: str) -> Config:
    return tiny(**(EXPERTS | {"run__folder": str(folder)} | changes))


@pytest.fixture(scope="module")
def single(ranks1: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return ranks1.run(run_here, config(tmp_path_factory.mktemp("single")))[0]


def same(result: dict, expected: dict) -> None:
    shared = {key: expected[key] for key in ("initial", "losses", "norms", "more", "buffers")}
    assert_same_training([result], shared, norm_tolerance=1e-4)


def test_what_is_reported(single: dict) -> None:
    assert single["losses"][1] - single["losses"][10] > 0.2
    for numbers in single["more"].values():
        assert list(numbers) == ["experts/max_load", "experts/idle", "experts/entropy", "experts/balance_loss"]
        assert 1 < numbers["experts/max_load"] <= 2  # of 4 experts, 2 for each token: the mean is half of the tokens
        assert 0 < numbers["experts/entropy"] <= math.log(4)
    assert list(single["buffers"]) == ["layers.0.ffn.router.bias", "layers.1.ffn.router.bias"]
    assert all(any(biases) for biases in single["buffers"].values())


def test_the_balancing_loss_acts(ranks1: Ranks, single: dict, tmp_path: Path) -> None:
    without = ranks1.run(run_here, config(tmp_path, moe__balance_loss="0"))[0]
    assert max(abs(without["norms"][step] - norm) for step, norm in single["norms"].items()) > 1e-3


@pytest.mark.slow
def test_two_processes(ranks2: Ranks, single: dict, tmp_path: Path) -> None:
    layout = {"training__microbatch_size": "2", "parallel__activation_checkpointing": "selective"}
    for result in ranks2.run(run_here, config(tmp_path, **layout)):
        same(result, single)


@pytest.mark.nightly
def test_four_processes(ranks4: Ranks, single: dict, tmp_path: Path) -> None:
    layout = {"parallel__dp_replicate": "2", "parallel__activation_checkpointing": "full"}
    for result in ranks4.run(run_here, config(tmp_path, **layout)):
        same(result, single)


@pytest.mark.slow
def test_resumed_bit_for_bit(ranks1: Ranks, tmp_path: Path) -> None:
    constant = {"schedule__decay": "none"}
    unbroken = ranks1.run(run_here, config(tmp_path / "once", **constant))[0]
    first = ranks1.run(run_here, config(tmp_path / "twice", training__steps="4", **constant))[0]
    second = ranks1.run(run_here, config(tmp_path / "twice", **constant))[0]
    assert second["resumed"] == 4
    assert second["final"] == unbroken["final"]
    assert second["buffers"] == unbroken["buffers"] != first["buffers"]
    assert first["losses"] | second["losses"] == unbroken["losses"]
    assert first["more"] | second["more"] == unbroken["more"]


@pytest.mark.slow
def test_resumed_on_other_layouts(ranks1: Ranks, ranks4: Ranks, single: dict, tmp_path: Path) -> None:
    constant = {"schedule__decay": "none"}
    expected = ranks1.run(run_here, config(tmp_path / "once", **constant))[0]
    ranks4.run(run_here, config(tmp_path / "twice", training__steps="4", parallel__dp_replicate="2", **constant))
    resumed = ranks1.run(run_here, config(tmp_path / "twice", **constant))[0]
    assert resumed["losses"] == pytest.approx({s: x for s, x in expected["losses"].items() if s > 4}, abs=1e-5)
    assert resumed["buffers"] == expected["buffers"]


def test_moe_settings_for_a_preset_without_experts() -> None:
    with pytest.raises(ConfigError, match=r"moe.top_k: model.preset 'debug' has no experts; these have: debug_moe, "):
        check(tiny(moe__top_k="1"), world_size=1)
