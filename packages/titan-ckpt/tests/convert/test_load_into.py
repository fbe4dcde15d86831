"""Weights of other programs into models that are there already."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from ckpt_load_cases import blank, fsdp, one_dimension, refuses_to_import, two_dimensions
from ckpt_sources import Fused, Map, Rename, Tensors, prefixed, read_all, small_external, small_internal, small_map
from parity import same_bits
from ranks import Ranks
from titan_ckpt import CheckpointError, HuggingFaceExport, export, import_weights, load_into, open_checkpoint
from titan_ckpt.convert.huggingface.reader import HuggingFaceDirectory
from titan_ckpt.convert.source import Cast


def test_one_process(tmp_path: Path) -> None:
    export(Tensors(prefixed(small_internal())), tmp_path / "hf", small_map())
    state = blank()
    load_into(state, HuggingFaceDirectory(tmp_path / "hf"), small_map())
    assert same_bits(state, small_internal())


def test_parameters_are_filled_in_place_in_their_own_dtype() -> None:
    model = torch.nn.Linear(3, 2).bfloat16()
    weight = torch.randn(2, 3)
    before = model.weight
    with pytest.raises(CheckpointError, match=r"missing in the file|missing in the weight map"):
        load_into(dict(model.named_parameters()), Tensors({"weight": weight}))
    load_into(dict(model.named_parameters()), Tensors({"weight": weight, "bias": torch.ones(2)}))
    assert model.weight is before
    assert torch.equal(model.weight, weight.bfloat16())
    assert model.weight.requires_grad


def test_all_misfits_are_reported_at_once_and_nothing_is_changed() -> None:
    rules = [Rename(["a"], ["A"]), Rename(["b"], ["B"]), Fused(["c"], ["C", "D"], [1, 1]), Rename(["e"], ["E"])]
    source = Tensors({name: torch.ones(1) for name in ("A", "C", "D", "stray", "x.inv_freq")})
    state = {name: torch.zeros(1) for name in ("a", "b", "c", "new")}
    with pytest.raises(CheckpointError) as error:
        load_into(state, source, Map(rules), ignore=["*.inv_freq"])
    message = str(error.value)
    assert "missing in the file (1):\n    B\n" in message
    assert "missing in the weight map (1):\n    new\n" in message
    assert "in the file but not in the weight map (1):\n    stray" in message
    assert "inv_freq" not in message
    assert not source.whole
    del state["b"], state["new"]
    with pytest.raises(CheckpointError, match=r"of another shape \(1\):\n    c: \[2\] in the file, \[1\] in the model"):
        load_into(state, source, Map(rules), ignore=["*.inv_freq", "stray"])
    assert all(not tensor.any() for tensor in state.values())


def test_a_stage_reads_only_its_own() -> None:
    source = Tensors(small_external())
    state = {"qkv": torch.zeros(8, 4)}
    load_into(state, source, small_map())
    assert torch.equal(state["qkv"], small_internal()["qkv"])
    assert source.whole == ["q", "k", "v"]


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("stored", FLOATS + OTHERS)
def test_only_numbers_are_cast(stored: torch.dtype, mapped: bool) -> None:
    """Every pair of dtypes: the four kinds of weights are cast to one another, all others only kept."""
    source = Tensors({"w": torch.ones(2).to(stored)})
    weight_map = Map([Transposed(["w"], ["w"])]) if mapped else None
    for wanted in FLOATS + OTHERS:
        state = {"w": torch.zeros(2).to(wanted)}
        if wanted == stored or {wanted, stored} <= set(FLOATS):
            load_into(state, source, weight_map)
            assert torch.equal(state["w"], torch.ones(2).to(wanted))
            continue
        with pytest.raises(CheckpointError, match=f"w: {stored} in the file, {wanted} in the model"):
            load_into(state, source, weight_map)
        assert torch.equal(state["w"], torch.zeros(2).to(wanted))


@pytest.mark.parametrize("stored", OTHERS)
def test_a_view_casts_only_numbers(stored: torch.dtype) -> None:
    source = Tensors({"w": torch.ones(2), "codes": torch.ones(2).to(stored)})
    if stored.is_floating_point:
        with pytest.raises(CheckpointError, match=f"codes is {stored}: quantized weights cannot be converted"):
            Cast(source, torch.bfloat16)
    else:
        assert {name: tensor.dtype for name, tensor in read_all(Cast(source, torch.bfloat16)).items()} == {
            "w": torch.bfloat16,
            "codes": stored,
        }
    with pytest.raises(CheckpointError, match="weights can only be converted to float64"):
        Cast(source, stored)


class Transposed(Rename):
    """Makes new tensors, so that the map is not a renaming."""

    def to_internal(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.internal[0]: tensors[self.external[0]].clone()}


@dataclass
class TiedMap(Map):
    """`e` may also be stored under the name `h`; tables are not read."""

    aliases: Mapping[str, str] = field(default_factory=lambda: {"h": "E"})
    ignored: Sequence[str] = (r"table\.\d+",)


def tied_map() -> TiedMap:
    return TiedMap([Rename(["e"], ["E"]), Rename(["w"], ["W"])])


@pytest.mark.parametrize("names", [("E",), ("h",), ("E", "h"), ("h", "E")])
def test_a_tied_weight_may_stand_under_either_name(names: Sequence[str], tmp_path: Path) -> None:
    e = torch.randn(3, 2)
    stored = Tensors(dict.fromkeys(names, e) | {"W": torch.ones(1), "table.0": torch.ones(5)})
    state = {"e": torch.zeros(3, 2), "w": torch.zeros(1)}
    load_into(state, stored, tied_map())
    assert torch.equal(state["e"], e)
    import_weights(stored, tmp_path / "imported", weight_map=tied_map())
    with open_checkpoint(tmp_path / "imported/step-00000000") as checkpoint:
        assert same_bits(read_all(checkpoint), {"model/e": e, "model/w": torch.ones(1)})
        export(checkpoint, tmp_path / "hf", tied_map())
    assert HuggingFaceDirectory(tmp_path / "hf").tensors.keys() == {"E", "W"}
    with pytest.raises(CheckpointError, match=r"in the file but not in the weight map \(1\):\n    table.x"):
        load_into(state, Tensors({**dict.fromkeys(names, e), "W": torch.ones(1), "table.x": e}), tied_map())


@pytest.mark.parametrize("other", [torch.zeros(3, 2), torch.ones(3, 2).double(), torch.ones(2, 3)])
def test_copies_of_a_tied_weight_that_differ_are_refused(other: torch.Tensor, tmp_path: Path) -> None:
    stored = Tensors({"E": torch.ones(3, 2), "h": other, "W": torch.ones(1)})
    state = {"e": torch.zeros(3, 2), "w": torch.zeros(1)}
    for attempt in (
        lambda: load_into(state, stored, tied_map()),
        lambda: import_weights(stored, tmp_path / "imported", weight_map=tied_map()),
    ):
        with pytest.raises(CheckpointError, match="the weight map ties h to E, but they differ in the file"):
            attempt()
    assert not state["w"].any()
    assert not (tmp_path / "imported").exists()
    load_into({"w": state["w"]}, stored, tied_map())  # a stage without the tied weight does not read it
    assert stored.whole.count("h") == 2


class ZeroOnly(Rename):
    """An internal tensor that the other side has no place for, and does not need while it is zero."""

    def to_external(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not tensors[self.internal[0]].is_meta and tensors[self.internal[0]].any():
            raise ValueError("the bias cannot be stored")
        return {}

    def to_internal(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self.internal[0]: torch.zeros(2)}


def test_every_rule_runs(tmp_path: Path) -> None:
    weight_map = Map([Rename(["w"], ["W"]), ZeroOnly(["bias"], [])])
    export(Tensors(prefixed({"w": torch.ones(1), "bias": torch.zeros(2)})), tmp_path / "hf", weight_map)
    with pytest.raises(CheckpointError, match="the bias cannot be stored"):
        export(Tensors(prefixed({"w": torch.ones(1), "bias": torch.ones(2)})), tmp_path / "wrong", weight_map)
    assert not (tmp_path / "wrong").exists()
    state = {"w": torch.zeros(1), "bias": torch.ones(2)}
    load_into(state, HuggingFaceDirectory(tmp_path / "hf"), weight_map)
    assert same_bits(state, {"w": torch.ones(1), "bias": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="has no place for bias: exporting a run's checkpoints would fail"):
        HuggingFaceExport(tmp_path / "run", weight_map)


@pytest.mark.parametrize("case", [one_dimension, two_dimensions])
def test_shards(case: Callable[[], dict[str, torch.Tensor]], ranks4: Ranks) -> None:
    loaded = ranks4.run(case)
    assert len(loaded) == 4
    assert all(same_bits(of_rank, small_internal()) for of_rank in loaded)


def test_a_model_under_fsdp(ranks4: Ranks) -> None:
    for output, expected in ranks4.run(fsdp):
        assert torch.allclose(output, expected, atol=1e-6)


def test_ranks_do_not_import_together(ranks4: Ranks) -> None:
    assert all("weights are imported by a single process" in message for message in ranks4.run(refuses_to_import))
