"""`config.json` both ways: every spelling is read as transformers reads it, what is not supported is refused."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_families import FAMILIES
from titan_model import DecoderConfig, RopeScaling
from titan_model.config import MoEConfig
from titan_model.convert.huggingface_config import config_from_huggingface, config_to_huggingface

# As transformers 4 wrote them, cut down to what a model's maker sets.
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
QWEN: dict[str, Any] = {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2}
MOE: dict[str, Any] = {
    **QWEN,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)


def any_config() -> st.SearchStrategy[DecoderConfig]:
    @st.composite
    def draw_config(draw: st.DrawFn) -> DecoderConfig:
        qk_norm = draw(st.booleans())
        layers, kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
        heads = kv_heads * draw(st.integers(1, 3))
        moe = None
        if qk_norm and draw(st.booleans()):
            moe = MoEConfig(
                n_experts=draw(st.integers(4, 9)),
                top_k=draw(st.integers(1, 4)),
                ffn_dim=8 * draw(st.integers(1, 3)),
                dense_layers=tuple(sorted(draw(st.sets(st.integers(0, layers - 1), max_size=layers)))),
                normalize_top_k=draw(st.booleans()),
            )
        return DecoderConfig(
            vocab_size=draw(st.integers(1, 99)),
            dim=heads * 8,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=kv_heads,
            # Qwen3 always says how wide heads are, a Llama only if it is not dim / n_heads.
            head_dim=draw(st.sampled_from([8, 12]) if qk_norm else st.sampled_from([None, 12])),
            ffn_dim=draw(st.integers(1, 99)),
            moe=moe,
            max_seq_len=draw(st.integers(1, 10_000)),
            norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
            qk_norm=qk_norm,
            rope_theta=draw(st.sampled_from([10_000.0, 1e6])),
            rope_scaling=draw(st.none() | st.just(SCALING)),
            tied_embeddings=draw(st.booleans()),
            init_std=draw(st.sampled_from([0.02, 0.01])),
        )

    return draw_config()


@settings(deadline=None, max_examples=100)
@given(config=any_config())
def test_every_config_survives_there_and_back(config: DecoderConfig) -> None:
    through_json = json.loads(json.dumps(config_to_huggingface(config)))
    assert config_from_huggingface(through_json) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_spelling_of_it_is_read(tmp_path: Path, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    values = config_to_huggingface(FAMILIES[family])
    transformers.AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written  # the spelling of transformers 5, which we do not write
    assert config_from_huggingface(written) == FAMILIES[family]


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ],
    ids=["rope_scaling", "type", "rope_parameters", "mixed"],
)
@pytest.mark.parametrize("values", [LLAMA, QWEN, MOE], ids=["llama", "qwen3", "qwen3_moe"])
def test_scaled_rotary_positions_are_read_in_every_spelling(values: Mapping[str, Any], rotary: dict[str, Any]) -> None:
    config = config_from_huggingface({**values, **rotary})
    assert (config.rope_theta, config.rope_scaling) == (5e5, SCALING)


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_plain_rotary_positions_are_read_in_every_spelling(rotary: dict[str, Any]) -> None:
    config = config_from_huggingface({**LLAMA, **rotary})
    assert (config.rope_theta, config.rope_scaling) == (5e5, None)


@pytest.mark.parametrize("values", [LLAMA, QWEN, MOE], ids=["llama", "qwen3", "qwen3_moe"])
def test_what_is_left_out_is_what_transformers_takes_it_for(values: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    described = {key: value for key, value in values.items() if key != "model_type"}
    theirs = transformers.AutoConfig.for_model(values["model_type"], **described)
    assert config_from_huggingface(values) == config_from_huggingface(theirs.to_dict())


def test_key_value_heads_are_as_many_as_query_heads_only_where_that_is_said() -> None:
    assert config_from_huggingface(LLAMA).n_kv_heads == 4
    assert config_from_huggingface({**QWEN, "num_key_value_heads": None}).n_kv_heads == 4
    for values in (QWEN, MOE):  # for which transformers has defaults that fit a single size
        with pytest.raises(ValueError, match="num_key_value_heads is missing"):
            config_from_huggingface({key: value for key, value in values.items() if key != "num_key_value_heads"})


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [0, 3]}, (0, 3)),
        ({"decoder_sparse_step": 2}, (0, 2, 4)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [5]}, (0, 1, 3, 4, 5)),
    ],
)
def test_dense_layers_are_those_of_transformers(settings: dict[str, Any], dense: tuple[int, ...]) -> None:
    moe = config_from_huggingface({**MOE, **settings}).moe
    assert moe is not None
    assert moe.dense_layers == dense
    transformers = pytest.importorskip("transformers")
    described = {key: value for key, value in MOE.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model("qwen3_moe", **described, **settings)
    layers = transformers.AutoModelForCausalLM.from_config(config).model.layers
    assert tuple(i for i, layer in enumerate(layers) if not hasattr(layer.mlp, "experts")) == dense


@pytest.mark.parametrize(
    ("values", "changes", "said"),
    [
        (LLAMA, {"model_type": "mistral"}, ["model_type is 'mistral'", "llama, qwen3, qwen3_moe"]),
        (LLAMA, {"model_type": None}, ["model_type is None"]),
        (LLAMA, {"attention_bias": True}, ["attention_bias is True"]),
        (LLAMA, {"mlp_bias": True}, ["mlp_bias is True"]),
        (LLAMA, {"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
        (LLAMA, {"attention_dropout": 0.1}, ["attention_dropout is 0.1"]),
        (LLAMA, {"quantization_config": {"bits": 4}}, ["quantization_config is {'bits': 4}"]),
        (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_type is 'linear'"]),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["rope_type is 'yarn'"]),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, ["factor is missing", "low_freq_factor is missing"]),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["differ by layer (full_attention)"]),
        (QWEN, {"use_sliding_window": True}, ["use_sliding_window is True"]),
        (QWEN, {"layer_types": ["sliding_attention"]}, ["layer_types has sliding_attention"]),
        (QWEN, {"hidden_size": None, "vocab_size": None}, ["hidden_size is missing", "vocab_size is missing"]),
        (MOE, {"num_experts": 0}, ["num_experts is missing"]),
        (MOE, {"num_experts_per_tok": None}, ["num_experts_per_tok is missing"]),
        (
            MOE,
            {"attention_bias": True, "use_sliding_window": True, "rope_scaling": {"type": "dynamic"}},
            ["attention_bias is True", "use_sliding_window is True", "rope_type is 'dynamic'"],
        ),
    ],
)
def test_what_a_decoder_is_not_is_refused_by_key_and_value(
    values: dict[str, Any], changes: dict[str, Any], said: list[str]
) -> None:
    config_from_huggingface(values)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        config_from_huggingface({**values, **changes})
    assert all(part in str(caught.value) for part in said), caught.value


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"norm": "layernorm"}, ["Hugging Face's llama", "norm is 'layernorm'"]),
        ("qwen3", {"norm": "np_layernorm"}, ["Hugging Face's qwen3", "norm is 'np_layernorm'"]),
        ("qwen3-moe", {"qk_norm": False}, ["Hugging Face's llama", "moe is set without qk_norm"]),
        ("llama-wide-heads", {"n_heads": 6}, ["dim 32 is not a multiple of n_heads 6"]),
        (
            "qwen3-moe",
            {"moe": MoEConfig(n_experts=4, top_k=2, ffn_dim=8, shared_ffn_dim=16, score="sigmoid", route_scale=2.5)},
            [
                "Hugging Face's qwen3_moe",
                "moe.shared_ffn_dim is 16",
                "moe.score is 'sigmoid'",
                "moe.route_scale is 2.5",
            ],
        ),
    ],
)
def test_what_transformers_has_no_model_for_is_refused(family: str, changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^Hugging Face's \w+ cannot represent this model") as caught:
        config_to_huggingface(replace(FAMILIES[family], **changes))
    assert all(part in str(caught.value) for part in said), caught.value
