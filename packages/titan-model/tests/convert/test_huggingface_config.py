"""`config.json` both ways: every spelling is read as transformers reads it, what is not supported is refused."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_families import FAMILIES, random_tokens, randomize
from titan_model import (
    DecoderConfig,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    build,
    huggingface_map,
)
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
QWEN2: dict[str, Any] = {**QWEN, "model_type": "qwen2"}
MISTRAL: dict[str, Any] = {**QWEN, "model_type": "mistral"}
MIXTRAL: dict[str, Any] = {**QWEN, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
MOE: dict[str, Any] = {
    **QWEN,
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
GRANITE: dict[str, Any] = {**LLAMA, "model_type": "granite"}
SMOLLM3: dict[str, Any] = {**QWEN, "model_type": "smollm3"}
PHI3: dict[str, Any] = {**LLAMA, "model_type": "phi3"}
FAMILY_CONFIGS = [LLAMA, QWEN2, MISTRAL, MIXTRAL, GRANITE, SMOLLM3, QWEN, MOE]
# What the folder of a Phi-4-mini has: code that transformers has by now, and LongRoPE by its first name.
PHI4: dict[str, Any] = {
    **PHI3,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
    "rope_scaling": {"type": "longrope", "short_factor": [1, 1.0, 1.0], "long_factor": [1, 2.5, 30.0]},
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
    "sliding_window": 262_144,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALING = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)


def any_scaling() -> st.SearchStrategy[Any]:
    factors, contexts = st.sampled_from([1.5, 4.0]), st.sampled_from([16, 48])
    return (
        st.just(SCALING)
        | st.builds(LinearScaling, factor=factors)
        | st.builds(
            YarnScaling,
            factor=factors,
            original_context=contexts,
            attention_factor=st.none() | st.just(0.5),
            beta_fast=st.sampled_from([32.0, 8.0]),
            truncate=st.booleans(),
        )
    )


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
            qkv_bias=not qk_norm and draw(st.booleans()),
            rope_theta=draw(st.sampled_from([10_000.0, 1e6])),
            rope_scaling=draw(st.none() | any_scaling()),
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


YARN = {"factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("rotary", "expected", "longest"),
    [
        ({"type": "linear", "factor": 2}, LinearScaling(factor=2), 512),
        # The length of pre-training is `max_position_embeddings`, beyond which dynamic scaling begins.
        ({"type": "dynamic", "factor": 3.0}, DynamicScaling(factor=3.0, original_context=512), 1536),
        ({"type": "yarn", **YARN}, YarnScaling(factor=4.0, original_context=128), 512),
        ({"rope_type": "yarn", "factor": 4.0}, YarnScaling(factor=4.0, original_context=512), 512),
        (
            {"rope_type": "yarn", **YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            YarnScaling(factor=4.0, original_context=128, attention_factor=1.0),
            512,
        ),
        (
            {"rope_type": "yarn", **YARN, "attention_factor": 0.5, "beta_fast": 16, "truncate": False, "mscale": 3.0},
            YarnScaling(factor=4.0, original_context=128, attention_factor=0.5, beta_fast=16, truncate=False),
            512,
        ),
    ],
    ids=["linear", "dynamic", "yarn", "yarn-no-original", "yarn-mscale", "yarn-all"],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scalings_are_read(rotary: dict[str, Any], expected: Any, longest: int, key: str) -> None:
    for values in (LLAMA, QWEN2, MIXTRAL, QWEN):
        config = config_from_huggingface({**values, key: rotary})
        assert (config.rope_scaling, config.max_seq_len) == (expected, longest)
        assert config_from_huggingface(config_to_huggingface(config)) == config


def test_dynamic_scaling_is_written_for_its_whole_length_only() -> None:
    with pytest.raises(ValueError, match=r"max_seq_len is 100, it supports 128 only \(factor \* original_context"):
        config_to_huggingface(replace(FAMILIES["llama-dynamic"], max_seq_len=100))


@pytest.mark.parametrize("values", FAMILY_CONFIGS, ids=lambda values: values["model_type"])
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
        (LLAMA, {"model_type": "gemma"}, ["model_type is 'gemma'", "llama, granite, mistral, mixtral, phi3, qwen2,"]),
        (LLAMA, {"model_type": None}, ["model_type is None"]),
        (LLAMA, {"model_type": ["llama"]}, ["model_type is ['llama']"]),
        (LLAMA, {"attention_bias": True}, ["attention_bias is True"]),
        (LLAMA, {"mlp_bias": True}, ["mlp_bias is True"]),
        (LLAMA, {"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
        (LLAMA, {"is_causal": False}, ["is_causal is False"]),
        (LLAMA, {"attention_multiplier": 0.5}, ["attention_multiplier is 0.5, which is not known", "remove it"]),
        (LLAMA, {"a_key_of_next_year": {"x": 1}}, ["a_key_of_next_year is {'x': 1}, which is not known"]),
        (LLAMA, {"logit_scale": 0.5, "embedding_multiplier": 12.0}, ["logit_scale is 0.5", "embedding_multiplier is"]),
        (LLAMA, {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, ["auto_map replaces AutoModelForCausalLM"]),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, ["architectures has 'LlamaForSequence"]),
        (LLAMA, {"sliding_window": 64}, ["sliding_window is 64"]),
        (GRANITE, {"attention_bias": True}, ["attention_bias is True"]),
        (GRANITE, {"logits_scaling": "8"}, ["logits_scaling is '8', must be a finite number"]),
        (GRANITE, {"sliding_window": 64}, ["sliding_window is 64, a granite attends to the full sequence"]),
        (SMOLLM3, {"no_rope_layers": [1, 0]}, ["no_rope_layers has 2 entries, but num_hidden_layers is 6"]),
        (SMOLLM3, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        (PHI3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["'linear', a phi3 supports default, longrope"]),
        (PHI3, {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, ["auto_map replaces AutoModelForCausalLM"]),
        (PHI4, {"lm_head_bias": True}, ["lm_head_bias is True"]),
        (PHI4, {"rope_scaling": {"type": "longrope", "short_factor": [1]}}, ["long_factor is missing"]),
        (
            PHI4,
            {"rope_scaling": {"type": "su", "short_factor": [0], "long_factor": 3}},
            ["short_factor", "long_factor"],
        ),
        (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, ["factor is missing from the rotary settings"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["rotary settings", "factor must be at least 1"]),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 2}}, ["beta_fast of the rotary"]),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 2}},
            ["0 < beta_slow < beta_fast"],
        ),
        (QWEN2, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}}, ["truncate of the rotary"]),
        (
            LLAMA,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}},
            ["original_max_position_embeddings of the rotary settings is 64", "max_position_embeddings, 512"],
        ),
        (LLAMA, {"rope_scaling": {"type": "ntk", "factor": 2.0}}, ["rope_type is 'ntk'", "linear, dynamic, yarn"]),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3"}}, ["factor is missing", "low_freq_factor is missing"]),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "mscale": 2}},
            ["mscale of the rotary settings is 2"],
        ),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 1.0, "attention_factor": 2}}, ["attention_factor"]),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["differ by layer (full_attention)"]),
        (LLAMA, {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, ["rope_theta is given twice"]),
        (LLAMA, {"rope_scaling": {"type": "llama3", "rope_type": "default", **LLAMA3}}, ["given twice"]),
        (
            LLAMA,
            {
                "rope_scaling": {"type": "llama3", **LLAMA3},
                "rope_parameters": {"type": "llama3", **LLAMA3, "factor": 4},
            },
            ["rope_scaling and rope_parameters differ"],
        ),
        (
            LLAMA,
            {"original_max_position_embeddings": 128, "rope_scaling": {"type": "llama3", **LLAMA3}},
            ["original_max_position_embeddings is given twice, as 128 and as 64"],
        ),
        (MISTRAL, {"layer_types": ["full_attention"] * 6, "sliding_window": 8}, ["that of all layers"]),
        (MISTRAL, {"attention_bias": True, "num_key_value_heads": 3}, ["attention_bias is True"]),
        (MIXTRAL, {"num_local_experts": None}, ["num_local_experts is missing"]),
        (MIXTRAL, {"moe_intermediate_size": 8}, ["moe_intermediate_size is 8, which is not known"]),
        (MIXTRAL, {"router_jitter_noise": 0.5}, ["router_jitter_noise is 0.5"]),
        (QWEN2, {"architectures": ["Qwen2ForTokenClassification"]}, ["a Decoder is a Qwen2ForCausalLM"]),
        (QWEN, {"layer_types": ["sliding_attention"] * 6}, ["layer_types has 'sliding_attention', but no sliding"]),
        (QWEN, {"layer_types": ["chunked_attention"] * 6}, ["layer_types has 'chunked_attention'"]),
        (QWEN, {"layer_types": ["full_attention"] * 5}, ["layer_types has 5 entries, but num_hidden_layers is 6"]),
        (QWEN, {"hidden_size": None, "vocab_size": None}, ["hidden_size is missing", "vocab_size is missing"]),
        (MOE, {"num_experts": 0}, ["num_experts is 0"]),
        (MOE, {"num_experts": None}, ["num_experts is missing"]),
        (MOE, {"num_local_experts": 4}, ["num_experts and num_local_experts differ"]),
        (MOE, {"num_experts_per_tok": None}, ["num_experts_per_tok is missing"]),
        (MOE, {"shared_expert_intermediate_size": 8}, ["shared_expert_intermediate_size is 8, which is not known"]),
        (
            MOE,
            {"attention_bias": True, "is_causal": False, "rope_scaling": {"type": "axial"}},
            ["attention_bias is True", "is_causal is False", "rope_type is 'axial'"],
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


def test_quantization_is_named_and_not_printed_whole() -> None:
    settings = {"quant_method": "gptq", "bits": 4, "modules_to_not_convert": [f"layers.{i}" for i in range(500)]}
    with pytest.raises(ValueError, match="quant_method 'gptq', bits 4: quantized weights") as caught:
        config_from_huggingface({**LLAMA, "quantization_config": settings})
    assert len(str(caught.value)) < 200


WRONG = [True, "3", 2.5, -1, 0, [3], {"a": 3}, float("nan"), float("inf"), "x" * 10_000]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("values", [LLAMA, QWEN, MOE], ids=["llama", "qwen3", "qwen3_moe"])
def test_wrong_types_are_one_error_that_names_all(values: dict[str, Any], value: object) -> None:
    counts = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ]
    counts += ["intermediate_size", "max_position_embeddings", "sliding_window"]
    counts += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"] if values is MOE else []
    with pytest.raises(ValueError, match=r"^config\.json") as caught:
        config_from_huggingface({**values, **dict.fromkeys(counts, value)})
    assert all(f"{key} is " in str(caught.value) for key in counts), caught.value
    assert len(str(caught.value)) < 200 * len(counts)
    # What no key of this kind may be.
    others = ["rms_norm_eps", "rope_theta", "tie_word_embeddings", "rope_scaling", "layer_types", "architectures"]
    others += ["norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"] if values is MOE else []
    for key in others:
        try:
            config_from_huggingface({**values, key: value})
        except ValueError as error:
            assert len(str(error)) < 400  # noqa: PT017 - some of these values are valid


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.1, "embd_pdrop": 0.1, "hidden_dropout_prob": 0.5, "classifier_dropout": 0.1},
        {"hidden_act": "swish"},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 1}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 256}},
        {"rope_scaling": {}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "factor": 1.0}},
        {"embedding_multiplier": 1.0, "residual_multiplier": 1, "logits_scaling": 1.0, "partial_rotary_factor": 1.0},
        {"is_causal": True, "is_encoder_decoder": False, "pruned_heads": {}, "a_key_of_next_year": None},
        {"architectures": None, "auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}},
        {"eos_token_id": [1, 2], "bos_token_id": 0, "torch_dtype": "bfloat16", "use_cache": False, "num_labels": 3},
        {"use_sliding_window": False, "sliding_window": 4096},
        {"temperature": 0.6, "id2label": {"0": "LABEL_0"}, "_name_or_path": "x", "rope_interleaved": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("values", FAMILY_CONFIGS, ids=lambda values: values["model_type"])
def test_what_changes_nothing_passes(values: dict[str, Any], changes: dict[str, Any]) -> None:
    assert config_from_huggingface({**values, **changes}) == config_from_huggingface(values)


def test_a_phi_is_read_with_all_its_fields() -> None:
    config = config_from_huggingface(PHI4)
    assert config.rope_scaling == LongRopeScaling(
        short_factor=(1.0, 1.0, 1.0), long_factor=(1.0, 2.5, 30.0), original_context=64, factor=8.0
    )
    assert (config.rotary_dim, config.attention_head_dim, config.window) == (6, 8, None)
    assert config_from_huggingface(config_to_huggingface(config)) == config
    su = {**PHI4, "rope_scaling": {**PHI4["rope_scaling"], "type": "su"}}
    assert config_from_huggingface(su) == config
    # Releases of transformers up to 4.44 accept these three entries and no other.
    assert config_to_huggingface(config)["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}


def test_layers_without_rotary_positions_are_those_of_transformers() -> None:
    assert config_from_huggingface(SMOLLM3).nope_layers == (3,)
    assert config_from_huggingface({**SMOLLM3, "no_rope_layer_interval": 2}).nope_layers == (1, 3, 5)
    config = config_from_huggingface({**SMOLLM3, "no_rope_layers": [1, 1, 0, 1, 1, 0], "sliding_window": 64})
    assert (config.nope_layers, config.window) == ((2, 5), None)
    windows = {"use_sliding_window": True, "sliding_window": 64}
    assert config_from_huggingface({**SMOLLM3, **windows}).full_layers == (0, 1, 2, 4, 5)


def test_a_granite_has_factors_of_one_where_it_does_not_say() -> None:
    config = config_from_huggingface({**GRANITE, "attention_multiplier": 0.25, "logits_scaling": 8})
    assert (config.attention_multiplier, config.logits_scaling) == (0.25, 8)
    assert (config.embedding_multiplier, config.residual_multiplier) == (1, 1)
    assert config_from_huggingface(GRANITE).attention_multiplier == 1


def test_windows_that_no_layer_uses_pass() -> None:
    full = ["full_attention"] * 6
    for changes in (
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 6},
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0, "layer_types": full},
    ):
        assert config_from_huggingface({**QWEN, **changes}) == config_from_huggingface(QWEN)


@pytest.mark.parametrize(
    ("values", "changes", "window", "full"),
    [
        (MISTRAL, {"sliding_window": 64}, 64, ()),
        (MISTRAL, {"sliding_window": None}, None, ()),
        (MISTRAL, {"max_position_embeddings": 8192}, 4096, ()),  # the default of transformers
        (MISTRAL, {}, None, ()),  # which is more than these 512
        (MISTRAL, {"sliding_window": 64, "layer_types": ["sliding_attention"] * 6}, 64, ()),
        (MIXTRAL, {"max_position_embeddings": 8192}, None, ()),
        (MIXTRAL, {"sliding_window": 64}, 64, ()),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4}, 64, (0, 1, 2, 3)),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64}, None, ()),
        (QWEN, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, 64, ()),
        (
            QWEN,
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
            },
            64,
            (1, 3, 5),
        ),
        ({**MOE, "head_dim": 8}, {"use_sliding_window": True, "sliding_window": 64}, 64, ()),
    ],
)
def test_windows_are_those_of_transformers(
    values: dict[str, Any], changes: dict[str, Any], window: int | None, full: tuple[int, ...]
) -> None:
    config = config_from_huggingface({**values, **changes})
    assert (config.window, config.full_layers) == (window, full)
    assert config_from_huggingface(config_to_huggingface(config)) == config


# One of each model_type: those that differ most in the slow set, the others at night.
EVERY = [
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "mistral", "qwen3", "qwen3-moe")),
    *(pytest.param(family, marks=pytest.mark.nightly) for family in ("granite", "mixtral", "phi3", "qwen2", "smollm3")),
]


def alternatives(value: object) -> list[object]:
    """Return other values for a setting, of the same type where that is possible."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2, 1, 0.5]
    if isinstance(value, str):
        return ["gelu", "swish", "sliding_attention"]
    return [True, False, 1, 8, 0.5, "linear", ["sliding_attention", "full_attention"], [0], {"rope_type": "dynamic"}]


# What code that all models of transformers share reads from any config.
SHARED: dict[str, list[Any]] = {
    "is_causal": [True, False],
    "sliding_window": [8],
    "attention_chunk_size": [8],
    "head_dim": [8, 16],
    "attn_implementation": ["eager"],
    "rope_theta": [100.0],
    "partial_rotary_factor": [0.5],
    "rope_scaling": [
        {"rope_type": kind, "factor": factor, **more}
        for kind in ("linear", "dynamic", "yarn", "default")
        for factor in (1.0, 4.0)
        for more in ({}, {"original_max_position_embeddings": 32}, {"attention_factor": 2.0})
    ],
}


@pytest.mark.parametrize("family", EVERY)
def test_every_setting_of_transformers_means_the_same_or_is_refused_by_name(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    values = config_to_huggingface(FAMILIES[family])
    kind = values["model_type"]
    defaults = transformers.AutoConfig.for_model(kind).to_dict()
    settings = {key: alternatives(values.get(key, default)) for key, default in defaults.items()}
    settings = {key: [*settings.get(key, []), *SHARED.get(key, [])] for key in {**settings, **SHARED}}
    tried = {"same": 0, "refused": 0, "invalid": 0}
    for key, choices in settings.items():
        for choice in choices:
            # A copy: transformers adds entries to the dicts that it is given.
            tried[outcome(transformers, copy.deepcopy({**values, key: choice}), key)] += 1
    assert tried["same"] > 40
    assert tried["refused"] > 40


def outcome(transformers: Any, values: dict[str, Any], key: str) -> str:
    """Return whether settings are refused, by name; if not, check that the logits are those of transformers."""
    try:
        config = config_from_huggingface(values)
    except ValueError as error:
        rotary = key.startswith("rope") and ("rotary settings" in str(error) or "rope_type" in str(error))
        renamed = {"rms_norm_eps": "norm_eps", "initializer_range": "init_std"}
        known = key in str(error) or renamed.get(key, key) in str(error) or rotary or "config: " in str(error)
        assert known, (key, values[key], error)  # noqa: PT017
        return "refused"
    described = {name: value for name, value in values.items() if name != "model_type"}
    tokens = random_tokens(config)[:, : config.max_seq_len]
    try:
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(values["model_type"], **described)
        )
        theirs = theirs.float().eval()
        randomize(theirs)
        with torch.no_grad():
            expected = theirs(tokens, use_cache=False).logits
    except Exception:  # a value that transformers itself does not take
        return "invalid"
    ours = build(config, "cpu")
    ours.load_state_dict(to_internal(dict(theirs.state_dict()), config), strict=not config.tied_embeddings)
    if config.tied_embeddings:
        ours.head.weight = ours.embed.weight
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-4)
    return "same"


def to_internal(tensors: dict[str, torch.Tensor], config: DecoderConfig) -> dict[str, torch.Tensor]:
    internal: dict[str, torch.Tensor] = {}
    for rule in huggingface_map(config, fused_experts=True).rules:
        internal |= rule.to_internal({name: tensors[name] for name in rule.external})
    return internal


def test_what_transformers_knows_of_a_family_is_compared_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    key = "layer_norm_style"  # one that a later release may add
    monkeypatch.setattr(transformers.LlamaConfig, key, "pre", raising=False)
    assert config_from_huggingface({**LLAMA, key: "pre"}) == config_from_huggingface(LLAMA)
    with pytest.raises(ValueError, match=f"{key} is 'post', which is not known"):
        config_from_huggingface({**LLAMA, key: "post"})


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"norm": "layernorm"}, ["Hugging Face's llama", "norm is 'layernorm'"]),
        ("qwen3", {"norm": "np_layernorm"}, ["Hugging Face's qwen3", "norm is 'np_layernorm'"]),
        ("qwen3-moe", {"qk_norm": False}, ["Hugging Face's mixtral", "moe.ffn_dim is 24, it supports"]),
        ("llama", {"family": "qwen3"}, ["Hugging Face's qwen3", "qk_norm is not set, it always has"]),
        ("mistral", {"family": "llama"}, ["window is 24, it attends to the full sequence"]),
        ("llama", {"nope_layers": (0,), "family": "llama"}, ["nope_layers is [0], it has rotary positions in all"]),
        ("granite", {"qkv_bias": True}, ["Hugging Face's granite", "qkv_bias is set, it has no such biases"]),
        ("phi3", {"rope_scaling": LinearScaling(factor=2.0)}, ["it supports default, longrope"]),
        ("phi3-long", {"family": "llama"}, ["rotary_fraction is 0.75"]),
        ("mistral", {"full_layers": (1,)}, ["full_layers is [1]"]),
        (
            "mixtral",
            {"moe": MoEConfig(n_experts=4, top_k=2, ffn_dim=24, normalize_top_k=False, dense_layers=(0,))},
            ["moe.dense_layers is [0]", "moe.normalize_top_k is not set"],
        ),
        ("qwen3-moe", {"qkv_bias": True}, ["Hugging Face's qwen2", "moe is set", "qk_norm is set"]),
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
