"""Float8 trains near fp32 under every layout, converts what its kernels take, and is refused without hardware."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import parallel_cases as cases
import parallel_float8
from ranks import Ranks
from titan_parallel import Degrees, Float8Options, LayoutError, ParallelOptions
from titan_parallel.float8 import check_float8, convert_linears, is_float8

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is an optional extra")
EMULATED = Float8Options(emulate=True)
BOUND = 2e-2  # of a loss that starts above 3


def near(results: list[dict], plain: dict) -> None:
    for result in results:
        assert result["losses"] == pytest.approx(plain["losses"], abs=BOUND)
        assert result["losses"] != pytest.approx(plain["losses"], abs=1e-5)  # it did round
        assert result["norms"] == pytest.approx(plain["norms"], rel=5e-2)
        assert result["weights"].keys() == plain["weights"].keys()


@needs_torchao
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_recipes(ranks1: Ranks, plain: dict, recipe: str) -> None:
    near(ranks1.run(cases.train, Degrees(), ParallelOptions(float8=replace(EMULATED, recipe=recipe))), plain)


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        (Degrees(), ParallelOptions(float8=replace(EMULATED, fsdp_all_gather=True), activation_checkpointing="full")),
        (Degrees(tp=2), ParallelOptions(float8=replace(EMULATED, recipe="rowwise"))),
        pytest.param(
            Degrees(tp=2),
            ParallelOptions(float8=EMULATED, activation_checkpointing="selective"),
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            Degrees(),
            ParallelOptions(float8=EMULATED, compile_blocks=True, compile_backend="aot_eager"),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["fsdp-gather-ac", "tp-rowwise", "tp-sac", "fsdp-compile"],
)
def test_two_ranks(ranks2: Ranks, plain: dict, degrees: Degrees, options: ParallelOptions) -> None:
    near(ranks2.run(cases.train, degrees, options), plain)


@needs_torchao
@pytest.mark.slow
def test_from_meta(ranks2: Ranks, plain: dict) -> None:
    options = ParallelOptions(float8=replace(EMULATED, fsdp_all_gather=True))
    near(ranks2.run(parallel_float8.train_from_meta, Degrees(), options), plain)


@pytest.mark.slow
@needs_torchao
def test_layouts_agree(ranks1: Ranks, ranks2: Ranks) -> None:
    # One scale for each token does not depend on what other tokens the rank has; one for a tensor does.
    options = ParallelOptions(float8=replace(EMULATED, recipe="rowwise_with_gw_hp"))
    alone = ranks1.run(cases.train, Degrees(), options)[0]
    for result in ranks2.run(cases.train, Degrees(), options):
        assert result["losses"] == pytest.approx(alone["losses"], abs=1e-4)


@needs_torchao
def test_what_is_converted(ranks2: Ranks) -> None:
    linears = [f"stack.{i}.{name}" for i in range(3) for name in ("mix.query", "mix.key", "mix.value", "mix.out")]
    linears += [f"stack.{i}.mlp.{j}" for i in range(3) for j in (0, 2)]
    for names, parameters in ranks2.run(parallel_float8.converted, Degrees(tp=2), ParallelOptions(float8=EMULATED)):
        assert sorted(names) == sorted(linears)  # not the head
        assert set(parameters) == set(cases.build(False).state_dict())
    skip = replace(EMULATED, skip=("stack.*.mix", "stack.1.mlp.0"))
    for names, _ in ranks2.run(parallel_float8.converted, Degrees(tp=2), ParallelOptions(float8=skip)):
        assert sorted(names) == ["stack.0.mlp.0", "stack.0.mlp.2", "stack.1.mlp.2", "stack.2.mlp.0", "stack.2.mlp.2"]


@needs_torchao
def test_odd_sizes_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({str(i): nn.ModuleList([nn.Linear(32, 24), nn.Linear(32, 32)]) for i in range(2)})
    with caplog.at_level(logging.WARNING, logger="titan_parallel"):
        convert_linears(model, ["0", "1"], {}, 1, EMULATED)
    assert [is_float8(model["1"][i]) for i in range(2)] == [False, True]
    assert [record.message for record in caplog.records if record.name.startswith("titan_parallel")] == [
        "linears not converted to float8: *.0 (24 x 32 on a rank, not both multiples of 16)"
    ]


@needs_torchao
def test_sizes_are_those_of_a_rank(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    plan = {"tensor": {"0": "colwise", "1": "rowwise", "2": "colwise_kv"}, "heads": (4, 2)}
    with caplog.at_level(logging.WARNING, logger="titan_parallel"):
        convert_linears(model, [], plan, 4, EMULATED)
    assert not any(is_float8(module) for module in model)
    for said in ("* (8 x 32 on a rank", "* (32 x 8 on a rank", "* (ranks share its heads)"):
        assert said in caplog.text
    convert_linears(model, [], plan, 2, EMULATED)
    assert all(is_float8(module) for module in model)


@needs_torchao
def test_needs_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        LayoutError, match=r"8\.9 or above .*, but this is cpu; unset it or, for tests, set float8\.emulate"
    ):
        check_float8(Float8Options(), "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(LayoutError, match=r"this is compute capability 8\.0"):
        check_float8(Float8Options(), "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_float8(Float8Options(), "cuda")
    check_float8(EMULATED, "cpu")


def test_needs_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LayoutError, match=r"pip install 'titan-parallel\[float8\]'"):
        check_float8(EMULATED, "cpu")


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"recipe": "blockwise"}, "float8.recipe: 'blockwise' is not one of ['tensorwise', 'rowwise', "),
        (
            {"recipe": "rowwise", "fsdp_all_gather": True},
            "fsdp_all_gather: requires recipe 'tensorwise', not 'rowwise'",
        ),
        ({"skip": "stack.1"}, "float8.skip: 'stack.1' is a string; write a tuple"),
    ],
)
def test_contradictions(chosen: dict, says: str) -> None:
    with pytest.raises(LayoutError) as refused:
        Float8Options(**chosen)
    assert says in str(refused.value)
