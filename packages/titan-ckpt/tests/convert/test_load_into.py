"""Weights of other programs into models that are there already."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ckpt_load_cases import blank, fsdp, one_dimension, refuses_to_import, two_dimensions
from ckpt_sources import Fused, Map, Rename, Tensors, prefixed, small_external, small_internal, small_map
from parity import same_bits
from ranks import Ranks
from titan_ckpt import CheckpointError
from titan_ckpt.convert.huggingface.reader import HuggingFaceDirectory
from titan_ckpt.convert.huggingface.writer import export
from titan_ckpt.convert.load_into import load_into


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
