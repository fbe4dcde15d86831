"""Pipelines of the real decoder: its own masks on every stage, its loss in the head, one loss with one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity import assert_same_training
from ranks import Ranks
from titan_train.check import check
from titan_train.config import Config
from titan_train.errors import ConfigError
from train_cases import run_here, sampled, tiny

MODEL = {
    "model__n_layers": "5",
    "model__n_kv_heads": "2",
    "data__mask_documents": "true",
    "data__packing": "best_fit",
    "training__z_loss": "1e-3",
    "training__steps": "6",
}
EXPERTS = {
    "model__preset": "debug_moe",
    "moe__n_experts": "4",
    "moe__ffn_dim": "32",
    "moe__balance_loss": "0.3",
    "moe__balance_bias_rate": "0.01",
}
SCHEDULES = [pytest.param("ZBVZeroBubble", marks=pytest.mark.nightly), "1F1B"]


def config(folder: Path, schedule: str = "1F1B", **changes: str) -> Config:
    pipeline = {"parallel__pp": "2", "parallel__pipeline_schedule": schedule, "training__microbatch_size": "1"}
    return tiny(**(MODEL | pipeline | {"run__folder": str(folder)} | changes))


class Alone(dict[str, dict]):
    """Results of one process, computed when they are first needed."""

    def __init__(self, ranks1: Ranks, folder: Path) -> None:
        self._one, self._folder = ranks1, folder

    def __missing__(self, name: str) -> dict:
        changes = {"untied": {}, "tied": {"model__tied_embeddings": "true"}, "experts": EXPERTS}[name]
        # One sequence at a time: a router's choice can turn on the rounding of larger products.
        self[name] = self._one.run(run_here, config(self._folder / name, parallel__pp="1", **changes))[0]
        assert self[name]["losses"][1] - self[name]["losses"][6] > 0.1  # a curve to follow
        return self[name]


@pytest.fixture(scope="module")
def single(ranks1: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return Alone(ranks1, tmp_path_factory.mktemp("single"))


def same(results: list[dict], expected: dict) -> None:
    shared = {key: expected[key] for key in ("losses", "norms", "more", "weights")}
    assert_same_training(results, shared, stages=True, norm_tolerance=1e-4, weight_tolerance=(1e-3, 1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(ranks2: Ranks, single: dict[str, dict], tmp_path: Path, schedule: str) -> None:
    same(ranks2.run(run_here, config(tmp_path / "untied", schedule)), single["untied"])
    tied = config(tmp_path / "tied", schedule, model__tied_embeddings="true")
    same(ranks2.run(run_here, tied), single["tied"])


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("schedule", "layout"),
    [
        ("ZBVZeroBubble", {"parallel__dp_replicate": "2"}),
        ("InterleavedZeroBubble", {"parallel__tp": "2"}),
        ("1F1B", {"parallel__activation_checkpointing": "selective", "parallel__pipeline_split": '["layers.1"]'}),
    ],
    ids=["ddp-zbv", "tp-zb", "fsdp-ac-split"],
)
def test_four_processes(
    ranks4: Ranks, single: dict[str, dict], tmp_path: Path, schedule: str, layout: dict[str, str]
) -> None:
    tied = config(tmp_path, schedule, model__tied_embeddings="true", **layout)
    same(ranks4.run(run_here, tied), single["tied"])


@pytest.mark.slow
def test_experts(ranks2: Ranks, single: dict[str, dict], tmp_path: Path) -> None:
    results = ranks2.run(run_here, config(tmp_path, "ZBVZeroBubble", **EXPERTS))
    same(results, single["experts"])
    assert {k: v for r in results for k, v in r["buffers"].items()} == single["experts"]["buffers"]


@pytest.mark.nightly
def test_compiled(ranks2: Ranks, single: dict[str, dict], tmp_path: Path) -> None:
    compiled = {"parallel__compile": "true", "parallel__compile_backend": "aot_eager"}
    same(ranks2.run(run_here, config(tmp_path, "ZBVZeroBubble", **compiled), timeout=240.0), single["untied"])


@pytest.mark.slow
def test_resumed_on_other_layouts(ranks1: Ranks, ranks2: Ranks, single: dict[str, dict], tmp_path: Path) -> None:
    constant, alone = {"schedule__decay": "none", "model__tied_embeddings": "true"}, {"parallel__pp": "1"}
    expected = ranks1.run(run_here, config(tmp_path / "once", **constant, **alone))[0]
    rest = {step: loss for step, loss in expected["losses"].items() if step > 3}
    for first, then in ((alone, {}), ({}, alone), ({"parallel__pipeline_schedule": "ZBVZeroBubble"}, {})):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        groups = [ranks1 if layout is alone else ranks2 for layout in (first, then)]
        groups[0].run(run_here, config(folder, training__steps="3", **(constant | first)))
        for result in groups[1].run(run_here, config(folder, **(constant | then))):
            assert result["resumed"] == 3
            assert result["losses"] == pytest.approx(rest, abs=1e-5)


@pytest.mark.slow
def test_sample(ranks1: Ranks, ranks2: Ranks, tmp_path: Path) -> None:
    wanted = {"sample__tokens": "5", "sample__prompt": "def"}
    (expected,) = ranks1.run(sampled, config(tmp_path / "1", parallel__pp="1", **wanted))
    assert expected
    for schedule in ("1F1B", "ZBVZeroBubble"):
        assert ranks2.run(sampled, config(tmp_path / schedule, schedule, **wanted)) == [expected] * 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"parallel__pipeline_schedule": "1f1b"},
            r"\[parallel\] unknown pipeline schedule '1f1b' \(did you mean '1F1B'",
        ),
        (
            {"training__microbatch_size": "8"},
            r"1F1B on 2 ranks takes at least as many as ranks, 2, but there are 1 .*\(a",
        ),
        (
            {"parallel__stages_per_rank": "3", "parallel__pipeline_schedule": "LoopedBFS"},
            "6 pipeline stages .* 5 blocks",
        ),
        ({"parallel__pipeline_split": '["layers.7"]'}, "pipeline_split: not the names of blocks: layers.7"),
        (
            {"training__global_batch_size": "1", "parallel__pipeline_schedule": "DualPipeV"},
            "DualPipeV on 2 ranks takes",
        ),
    ],
    ids=["schedule", "microbatches", "stages", "split", "rows"],
)
def test_errors_before_anything_runs(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(config(tmp_path, **changes), world_size=2)
    check(config(tmp_path), world_size=2)


def test_microbatches_are_chosen(tmp_path: Path) -> None:
    chosen = {"training__global_batch_size": "64", "training__microbatch_size": "none"}
    assert check(config(tmp_path, **chosen), 2).microbatch_size == 4  # 16 microbatches: idle for 1 of 17
    assert check(config(tmp_path, **chosen, parallel__pp="1"), 1).microbatch_size == 64
