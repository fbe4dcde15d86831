"""Initial weights: their spread, their names, their values for all time, and the loss they start from."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_model import Decoder, DecoderConfig, build, init_parameters, preset
from titan_model.config import MoEConfig
from titan_model.counter_rng import stream_key, truncated_normal

WORD = 1 << 64
RESIDUAL = re.compile(r"(o_proj|down_proj)(\.weight)?$")  # what writes to the residual stream
# Of a standard normal cut off at three deviations.
SPREAD = math.sqrt(1 - 2 * 3 * NormalDist().pdf(3.0) / (2 * NormalDist().cdf(3.0) - 1))


def initialized(config: DecoderConfig, seed: int = 0) -> Decoder:
    model = build(config, "meta")
    model.to_empty(device="cpu")
    if config.tied_embeddings:
        model.head.weight = model.embed.weight  # `to_empty` took them apart
    for parameter in model.parameters():
        parameter.detach().fill_(math.nan)
    init_parameters(model.named_parameters(), config, seed)
    return model


def element_by_hand(seed: int, name: str, index: int, std: float) -> float:
    """Return one weight with nothing of titan or torch: hash, SplitMix64, inverse normal distribution."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    z ^= z >> 31
    low, high = NormalDist().cdf(-3.0), NormalDist().cdf(3.0)
    return std * NormalDist().inv_cdf(low + (z + 0.5) / WORD * (high - low))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**64), data=st.data())
def test_each_element_is_a_function_of_seed_name_and_index(
    small_configs: st.SearchStrategy[DecoderConfig], seed: int, data: st.DataObject
) -> None:
    config = data.draw(small_configs)
    for name, parameter in initialized(config, seed).named_parameters():
        flat = parameter.detach().flatten().tolist()
        if parameter.dim() == 1:
            assert set(flat) == {0.0 if name.endswith(".bias") else 1.0}, name
            continue
        index = data.draw(st.integers(0, len(flat) - 1))
        depth = math.sqrt(2 * config.n_layers) if RESIDUAL.search(name) else 1.0
        assert flat[index] == pytest.approx(element_by_hand(seed, name, index, 0.02 / depth), rel=1e-5, abs=1e-9)


def test_buffers_are_zeros_and_may_be_handed_in_too() -> None:
    moe = MoEConfig(n_experts=3, top_k=1, ffn_dim=8, balance_bias_rate=0.1)
    config = DecoderConfig(vocab_size=8, dim=8, n_layers=2, n_heads=1, n_kv_heads=1, ffn_dim=8, max_seq_len=8, moe=moe)
    model = build(config, "cpu")
    for buffer in model.buffers():
        buffer.fill_(math.nan)
    init_parameters([*model.named_parameters(), *model.named_buffers()], config, 0)
    buffers = dict(model.named_buffers())
    assert {name.partition(".ffn.")[2] for name in buffers} == {"router.bias", "router.load"}
    assert not any(buffer.any() for buffer in buffers.values())


@pytest.mark.parametrize("init_std", [0.02, 0.1])
@pytest.mark.parametrize("n_layers", [1, 8])
@pytest.mark.parametrize(
    "moe", [None, MoEConfig(n_experts=3, top_k=1, ffn_dim=96, shared_ffn_dim=96)], ids=["dense", "moe"]
)
def test_spread_of_each_kind(n_layers: int, init_std: float, moe: MoEConfig | None) -> None:
    config = replace(preset("debug"), n_layers=n_layers, dim=128, ffn_dim=352, init_std=init_std, moe=moe, qk_norm=True)
    kinds = set()
    for name, parameter in initialized(config).named_parameters():
        kinds.add(name.split(".", 2)[-1] if name.startswith("layers.") else name)
        values = parameter.detach()
        if parameter.dim() == 1:
            assert torch.equal(values, torch.ones_like(values)), name
            continue
        std = init_std / math.sqrt(2 * n_layers) if RESIDUAL.search(name) else init_std
        # Each expert by itself: they are streams of their own, though they share a tensor.
        for part in values if parameter.dim() == 3 else [values]:
            n = part.numel()
            assert float(part.std()) == pytest.approx(std * SPREAD, rel=4 / math.sqrt(2 * n)), name
            assert abs(float(part.mean())) < 5 * std / math.sqrt(n), name
            assert float(part.abs().max()) <= 3 * std * (1 + 1e-6), name
        if parameter.dim() == 3:
            assert abs(float(torch.corrcoef(values.flatten(1)).triu(1).abs().max())) < 5 / math.sqrt(n), name
    assert len(kinds) == 3 + 8 + (3 if moe is None else 7)


def test_seeds_and_names_give_other_weights(tiny: DecoderConfig) -> None:
    square = replace(tiny, n_kv_heads=tiny.n_heads, vocab_size=32, ffn_dim=32)  # all matrices of one shape
    seen = set()
    for seed in range(3):
        matrices = [p for p in initialized(square, seed).parameters() if p.dim() == 2]
        # Directions, as the residual projections differ in scale by construction.
        seen |= {tuple((p / p.norm()).flatten()[:8].tolist()) for p in matrices}
    assert len(seen) == 3 * len(matrices)


def test_a_tied_weight_is_the_embedding(tiny: DecoderConfig) -> None:
    tied, untied = (initialized(replace(tiny, tied_embeddings=tied)) for tied in (True, False))
    assert tied.head.weight is tied.embed.weight
    for name, parameter in tied.named_parameters():
        assert torch.equal(parameter, untied.get_parameter(name)), name


def test_tied_weights_that_are_no_longer_tied_are_refused(tiny: DecoderConfig) -> None:
    config = replace(tiny, tied_embeddings=True)
    model = build(config, "meta")
    model.to_empty(device="cpu")
    assert model.head.weight is not model.embed.weight  # torch's doing, and silent
    with pytest.raises(ValueError, match=r"set `model\.head\.weight = model\.embed\.weight` first"):
        init_parameters(model.named_parameters(), config, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_get_the_same_numbers_rounded(tiny: DecoderConfig, dtype: torch.dtype) -> None:
    model = build(tiny, "cpu").to(dtype)
    init_parameters(model.named_parameters(), tiny, 5)
    key = stream_key(5, "embed.weight")
    exact = truncated_normal(key, torch.arange(37 * 32).view(37, 32), 3.0) * 0.02
    assert torch.equal(model.embed.weight, exact.to(dtype))


def test_a_tensor_of_more_than_one_chunk() -> None:
    weight = torch.empty(1100, 1000)
    assert weight.numel() > 2**20
    config = DecoderConfig(vocab_size=1100, dim=1000, n_layers=1, n_heads=4, n_kv_heads=4, ffn_dim=1, max_seq_len=1)
    init_parameters([("embed.weight", weight)], config, 0)
    at_once = truncated_normal(stream_key(0, "embed.weight"), torch.arange(weight.numel()), 3.0) * 0.02
    assert torch.equal(weight.flatten(), at_once.float())


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 31, 32, 33, 1000])
def test_values_do_not_depend_on_the_chunk(tiny: DecoderConfig, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    whole = initialized(tiny).state_dict()
    monkeypatch.setattr("titan_model.init._CHUNK", chunk)
    for name, value in initialized(tiny).state_dict().items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "layers.0.attn.q_proj.bias",
        "layers.0.attn.o_proj.lora_a.weight",
        "embed",
        "",
        # Wrappers' prefixes: another name would be another stream, so other weights in other layouts.
        "_orig_mod.embed.weight",
        "layers.0._checkpoint_wrapped_module.attn.q_proj.weight",
        "layers.0._checkpoint_wrapped_module.attn_norm.weight",
        "layers.x.attn.q_proj.weight",
        # Parts that other configs have, and blocks that this one has not.
        "layers.0.attn_norm.bias",
        "layers.0.attn.q_norm.weight",
        "layers.0.ffn.router.weight",
        "layers.0.ffn.experts.gate_proj",
        "layers.2.attn.q_proj.weight",
        "layers.01.attn.q_proj.weight",
    ],
)
def test_unknown_name_is_refused(tiny: DecoderConfig, name: str) -> None:
    value = torch.full((2, 2), math.nan)
    with pytest.raises(ValueError, match="not a parameter or buffer of a Decoder") as caught:
        init_parameters([(name, value)], tiny, 0)
    assert repr(name) in str(caught.value)
    assert bool(value.isnan().all())


def test_what_is_refused_names_what_was_meant(tiny: DecoderConfig) -> None:
    with pytest.raises(ValueError, match=r"nearest: layers\.1\.attn\.q_proj\.weight"):
        init_parameters([("layers.1.atn.q_proj.weight", torch.empty(2, 2))], tiny, 0)


def test_global_generator_is_neither_read_nor_moved(tiny: DecoderConfig) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = initialized(tiny).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = initialized(tiny).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_starts_at_a_guess_among_all_tokens(seed: int, tied: bool) -> None:
    config = replace(preset("debug"), tied_embeddings=tied)
    model = initialized(config, seed)
    tokens, labels = torch.randint(0, config.vocab_size, (2, 4, 128), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        loss = float(model(tokens, labels=labels).total) / labels.numel()
    assert abs(loss - math.log(config.vocab_size)) < 0.1


def test_the_stream_does_not_grow_with_depth(tiny: DecoderConfig, random_decoder: Callable[..., Decoder]) -> None:
    # What the residual projections' scaling is for: the blocks add about as much in all, however many there are.
    added = []
    for n_layers in (2, 32):
        config = replace(tiny, n_layers=n_layers, dim=128, init_std=0.1)
        model = initialized(config)
        ends: dict[str, Tensor] = {}
        model.embed.register_forward_hook(lambda _m, _i, out, ends=ends: ends.__setitem__("first", out))
        model.norm.register_forward_pre_hook(lambda _m, args, ends=ends: ends.__setitem__("last", args[0]))
        with torch.no_grad():
            model(torch.arange(37)[None])
        added.append(float((ends["last"] - ends["first"]).std()))
    assert 0.5 < added[1] / added[0] < 2.0
