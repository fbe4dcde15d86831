"""Configs refuse numbers that do not fit, all at once; presets are found by name or nearly."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_model import DecoderConfig, Llama3Scaling, preset, preset_names
from titan_model.config import MoEConfig

SIZES = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len")


@settings(deadline=None)
@given(wrong=st.dictionaries(st.sampled_from(SIZES), st.integers(-5, 0), min_size=1))
def test_error_names_every_size_below_one_and_no_other(tiny: DecoderConfig, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"^model config: ") as caught:
        replace(tiny, **wrong)
    errors = str(caught.value).removeprefix("model config: ").split("; ")
    assert sorted(errors) == sorted(f"{name} is {value}, must be at least 1" for name, value in wrong.items())


@pytest.mark.parametrize(
    ("changes", "errors"),
    [
        ({"dim": 30}, ["dim 30 is not a multiple of n_heads 4"]),
        ({"n_kv_heads": 3}, ["n_heads 4 is not a multiple of n_kv_heads 3"]),
        ({"n_kv_heads": 8}, ["n_heads 4 is not a multiple of n_kv_heads 8"]),
        ({"dim": 20}, ["dim / n_heads is 5; rotary embeddings need an even number"]),
        (
            {"dim": 30, "n_kv_heads": 3},
            ["dim 30 is not a multiple of n_heads 4", "n_heads 4 is not a multiple of n_kv_heads 3"],
        ),
        (
            {"dim": 20, "n_kv_heads": 3},
            [
                "dim / n_heads is 5; rotary embeddings need an even number",
                "n_heads 4 is not a multiple of n_kv_heads 3",
            ],
        ),
        # A size below one does not hide errors between the others.
        (
            {"ffn_dim": 0, "dim": 30, "n_kv_heads": 3},
            [
                "ffn_dim is 0, must be at least 1",
                "dim 30 is not a multiple of n_heads 4",
                "n_heads 4 is not a multiple of n_kv_heads 3",
            ],
        ),
        (
            {"dim": 0, "n_kv_heads": 3},
            ["dim is 0, must be at least 1", "n_heads 4 is not a multiple of n_kv_heads 3"],
        ),
        (
            {"n_kv_heads": 0, "dim": 30},
            ["n_kv_heads is 0, must be at least 1", "dim 30 is not a multiple of n_heads 4"],
        ),
    ],
)
def test_error_lists_every_error(tiny: DecoderConfig, changes: dict[str, int], errors: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^model config: ") as caught:
        replace(tiny, **changes)
    assert str(caught.value) == "model config: " + "; ".join(errors)


def test_config_is_frozen_and_keyword_only(tiny: DecoderConfig) -> None:
    with pytest.raises(FrozenInstanceError):
        tiny.dim = 64  # type: ignore[misc]
    with pytest.raises(TypeError):
        DecoderConfig(37, 32, 2, 4, 2, 48, 64)  # type: ignore[misc]


def test_every_name_is_a_preset() -> None:
    names = preset_names()
    assert len(names) == len(set(names))
    for name in names:
        assert isinstance(preset(name), DecoderConfig)
    # The byte tokenizer has 258 tokens, and training on it is what this preset is for.
    assert preset("debug").vocab_size >= 258


@pytest.mark.parametrize("name", preset_names())
def test_typo_names_the_preset_that_was_meant(name: str) -> None:
    dropped = {name[:i] + name[i + 1 :] for i in range(len(name))}
    swapped = {name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in range(len(name) - 1)}
    for typo in (dropped | swapped | {name.replace("_", "-"), name + "b"}) - set(preset_names()):
        with pytest.raises(KeyError) as caught:
            preset(typo)
        unknown, suggested = caught.value.args[0].split("; did you mean ")
        assert repr(typo) in unknown
        assert name in suggested


def test_name_unlike_any_lists_all_presets() -> None:
    with pytest.raises(KeyError) as caught:
        preset("zzz")
    assert all(name in caught.value.args[0] for name in preset_names())


@pytest.mark.parametrize(
    "values",
    [
        {"factor": 0.5},
        {"factor": 8.0, "low_freq_factor": 4.0},
        {"factor": 8.0, "low_freq_factor": 0.0},
        {"factor": 8.0, "original_context": 0},
    ],
)
def test_rope_scaling_refuses_wavelengths_that_do_not_fit(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="rope scaling"):
        Llama3Scaling(**values)


MOE = {"n_experts": 4, "top_k": 2, "ffn_dim": 8}


@pytest.mark.parametrize(
    ("values", "errors"),
    [
        ({"n_experts": 0, "top_k": 0, "ffn_dim": -8}, ["n_experts is 0", "top_k is 0", "ffn_dim is -8"]),
        ({"top_k": 5}, ["top_k 5 is greater than n_experts 4"]),
        ({"ffn_dim": 12}, ["ffn_dim 12 is not a multiple of 8"]),
        ({"shared_ffn_dim": -1, "balance_loss": -0.1}, ["shared_ffn_dim is -1", "balance_loss is -0.1"]),
        ({"balance_bias_rate": float("nan"), "route_scale": 0.0}, ["balance_bias_rate is nan", "route_scale is 0.0"]),
        ({"score": "tanh"}, ["score is 'tanh', must be one of softmax, sigmoid"]),
    ],
    ids=str,
)
def test_moe_config_lists_every_error(values: dict[str, Any], errors: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^moe config: ") as caught:
        MoEConfig(**{**MOE, **values})
    found = str(caught.value).removeprefix("moe config: ").split("; ")
    assert len(found) == len(errors)
    assert all(one.startswith(misfit) for one, misfit in zip(found, errors, strict=True))


def test_a_decoder_with_experts_refuses_what_they_cannot_have(tiny: DecoderConfig) -> None:
    with pytest.raises(
        ValueError, match=r"dim 36 is not a multiple of 8, which moe requires; moe\.dense_layers contains \[2\]"
    ):
        replace(tiny, dim=36, head_dim=8, moe=MoEConfig(**MOE, dense_layers=(1, 2)))
    assert replace(tiny, dim=36, head_dim=8).dim == 36
    config = replace(tiny, moe=MoEConfig(**MOE, dense_layers=(1,)))
    assert [config.has_experts(layer) for layer in range(2)] == [True, False]
