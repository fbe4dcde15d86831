"""Weight maps: no tensor is forgotten, none is named twice, and there and back is the same bits."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_families import FAMILIES, preset_mark
from titan_model import Decoder, DecoderConfig, Llama3Scaling, build, preset, preset_names
from titan_model.convert.errors import WeightsError
from titan_model.convert.huggingface_families import plainest_family
from titan_model.convert.huggingface_names import huggingface_map
from titan_model.convert.loading import external_shapes, internal_tensors
from titan_model.convert.meta_llama import meta_map
from titan_model.convert.weight_map import DecoderWeightMap, InterleavedRotary, TensorRule, ZeroOnly

MAPS: dict[str, Callable[[DecoderConfig], DecoderWeightMap]] = {
    "huggingface": huggingface_map,
    "huggingface-fused": lambda config: huggingface_map(config, fused_experts=True),
    "meta": meta_map,
}


def has_map(config: DecoderConfig, kind: str) -> bool:
    if kind == "huggingface-fused":
        return config.moe is not None
    if kind == "meta":
        scaled = config.rope_scaling is not None and not isinstance(config.rope_scaling, Llama3Scaling)
        return plainest_family(config) == "llama" and config.head_dim is None and not scaled
    return True


CONFIGS = {**FAMILIES, **{name: preset(name) for name in preset_names()}}
CASES = [(name, kind) for name, config in CONFIGS.items() for kind in MAPS if has_map(config, kind)]
TINY_CASES = [(name, kind) for name, kind in CASES if name in FAMILIES or name.startswith("debug")]
ALL_CASES = [pytest.param(*case, marks=[] if case in TINY_CASES else preset_mark(case[0], slow=True)) for case in CASES]


@pytest.mark.parametrize(("name", "kind"), ALL_CASES)
def test_every_tensor_has_one_rule(name: str, kind: str) -> None:
    config = CONFIGS[name]
    weights = MAPS[kind](config)
    internal = Counter(name for rule in weights.rules for name in rule.internal)
    external = Counter(name for rule in weights.rules for name in rule.external)
    assert set(internal.values()) == set(external.values()) == {1}
    assert internal.keys() == internal_tensors(config).keys()
    assert external.keys() == external_shapes(config, weights).keys()
    assert not weights.aliases.keys() & external.keys()
    assert set(weights.aliases.values()) <= external.keys()


@pytest.mark.parametrize(("name", "kind"), TINY_CASES)
def test_there_and_back_is_the_same_bits(random_decoder: Callable[..., Decoder], name: str, kind: str) -> None:
    model = random_decoder(CONFIGS[name])
    tensors = model.state_dict()
    moved = 0
    for rule in MAPS[kind](model.config).rules:
        external = rule.to_external({name: tensors[name] for name in rule.internal})
        assert external.keys() == set(rule.external)
        back = rule.to_internal(external)
        assert back.keys() == set(rule.internal)
        for key, tensor in back.items():
            assert torch.equal(tensor, tensors[key])
            moved += tensor.numel()
    assert moved == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "kind"), [case for case in ALL_CASES if case.values[1] != "meta"])
def test_names_and_shapes_are_those_of_transformers(name: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    weights = MAPS[kind](CONFIGS[name])
    ours = external_shapes(CONFIGS[name], weights)
    values = dict(weights.config)
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for alias in weights.aliases:
        del theirs[alias]
    if kind == "huggingface-fused" or CONFIGS[name].moe is None:
        assert ours == theirs
        return
    # In memory transformers holds the experts fused; their number of elements shows that none is lost.
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == sum(
        torch.Size(shape).numel() for shape in theirs.values()
    )


@settings(deadline=None, max_examples=50)
@given(heads=st.integers(1, 5), half=st.integers(1, 8), width=st.integers(1, 6))
def test_interleaving_pairs_what_was_halves_apart(heads: int, half: int, width: int) -> None:
    rule = InterleavedRotary(("ours",), ("theirs",), head_dim=2 * half)
    ours = torch.randn(heads * 2 * half, width, generator=torch.Generator().manual_seed(0))
    theirs = rule.to_external({"ours": ours})["theirs"]
    for head in range(heads):
        first = head * 2 * half
        for i in range(half):
            assert torch.equal(theirs[first + 2 * i], ours[first + i])
            assert torch.equal(theirs[first + 2 * i + 1], ours[first + i + half])
    assert torch.equal(rule.to_internal({"theirs": theirs})["ours"], ours)


def test_a_selection_bias_is_dropped_when_zero_and_refused_otherwise() -> None:
    rule: TensorRule = ZeroOnly(("layers.0.ffn.router.bias",), (), (4,))
    assert rule.to_external({"layers.0.ffn.router.bias": torch.zeros(4)}) == {}
    assert torch.equal(rule.to_internal({})["layers.0.ffn.router.bias"], torch.zeros(4))
    with pytest.raises(WeightsError, match=r"layers\.0\.ffn\.router\.bias is not zero.*balance_bias_rate"):
        rule.to_external({"layers.0.ffn.router.bias": torch.tensor([0.0, 0.0, 1e-3, 0.0])})


def test_maps_are_data_that_a_model_on_meta_can_make() -> None:
    config = preset("llama3_1_405b")
    tensors = build(config, "meta").state_dict()
    for rule in huggingface_map(config).rules:
        assert all(t.is_meta for t in rule.to_external({name: tensors[name] for name in rule.internal}).values())
