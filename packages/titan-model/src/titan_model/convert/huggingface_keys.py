"""Which keys and values of a `config.json` are understood, harmless, or refused.

A new key may change what a model computes (`is_causal` did, in transformers 5.2), so the rule is an allow-list: each
key is read by `huggingface_config`, known to change nothing (at all or at some values), or refused by name.

Called by `huggingface_config`, before it reads anything.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from titan_model.convert.errors import shown
from titan_model.convert.huggingface_families import FAMILIES
from titan_model.convert.huggingface_rope import RopeSettings, rope_errors
from titan_model.convert.huggingface_windows import window_errors


class ValueKind(NamedTuple):
    """A kind of value.

    Attributes:
        name: What it is, for messages.
        accepts: Returns whether a value is of this kind.
    """

    name: str
    accepts: Callable[[Any], bool]


COUNT = ValueKind("an integer of at least 1", lambda value: type(value) is int and value >= 1)
NUMBER = ValueKind(
    "a finite number", lambda value: isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
)
FLAG = ValueKind("true or false", lambda value: type(value) is bool)
COUNTS = ValueKind(
    "a list of integers", lambda value: isinstance(value, list) and all(type(item) is int for item in value)
)
NAMES = ValueKind(
    "a list of strings", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)
)
OBJECT = ValueKind("an object", lambda value: isinstance(value, Mapping))

_UNDERSTOOD = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "intermediate_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT,
    "head_dim": COUNT,
    "max_position_embeddings": COUNT,
    "rms_norm_eps": NUMBER,
    "initializer_range": NUMBER,
    "tie_word_embeddings": FLAG,
    # The rotary settings: see `huggingface_rope`.
    "rope_theta": NUMBER,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "original_max_position_embeddings": COUNT,
    # Which layers attend to the full sequence: see `huggingface_windows`.
    "use_sliding_window": FLAG,
    "sliding_window": COUNT,
    "max_window_layers": ValueKind("an integer", lambda value: type(value) is int),
    "layer_types": NAMES,
    "architectures": NAMES,
}
_EXPERTS = {"num_experts": COUNT, "num_local_experts": COUNT, "num_experts_per_tok": COUNT}
_UNDERSTOOD_EXPERTS = {
    None: {},
    "mixtral": _EXPERTS,
    "qwen": {
        **_EXPERTS,
        "moe_intermediate_size": COUNT,
        "norm_topk_prob": FLAG,
        "decoder_sparse_step": COUNT,
        "mlp_only_layers": COUNTS,
    },
}
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Keys for which a Decoder supports these values only; the first is what the message gives. (1 equals True and 1.0.)
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "pruned_heads": ({},),
    # Factors of other families.
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_ratio": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "router_jitter_noise": (0,),
    "interpolate_factor": (1,),
    "full_attn_mod": (1,),
    "lm_head_bias": (False,),
}

# Keys that change nothing that a Decoder computes, whatever their value: names and versions, token ids (see
# `save_huggingface`), the defaults of `generate`, what is returned and how it is computed.
_HARMLESS_KEYS = """
model_type _name_or_path name_or_path transformers_version torch_dtype dtype _commit_hash model_name is_llama_config
unsloth_version unsloth_fixed transformers.js_config tokenizer_class task_specific_params finetuning_task id2label
label2id num_labels problem_type max_sequence_length bos_token_id eos_token_id pad_token_id unk_token_id
sep_token_id cls_token_id mask_token_id decoder_start_token_id use_cache return_dict output_hidden_states
output_attentions output_router_logits router_aux_loss_coef torchscript chunk_size_feed_forward pretraining_tp
gradient_checkpointing use_bfloat16 tf_legacy_loss is_decoder cross_attention_hidden_size attn_implementation
_attn_implementation _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled use_flash_attn
experts_implementation _experts_implementation max_length min_length max_new_tokens do_sample early_stopping
num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix
"""
_HARMLESS = frozenset(_HARMLESS_KEYS.split())
# Code in the folders of released models that transformers has by now.
_OWN_CODE = ("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM")
_DROPOUT = re.compile(r"(\w+_)?(dropout|pdrop)(_prob)?")  # not applied: a Decoder has none
_QUANTIZED = ("quantization_config", "compression_config")
_MISSING = object()


def key_errors(values: Mapping[str, Any], kind: str, rope: RopeSettings) -> list[str]:
    """Return one message for each key that is missing, has the wrong type, or changes what a `Decoder` computes.

    Args:
        values: The contents of a `config.json`.
        kind: Its `model_type`, a key of `FAMILIES`.
        rope: Its rotary settings.
    """
    understood = _understood(kind)
    given = {key: value for key, value in values.items() if value is not None}
    mistyped = {
        key: f"{key} is {shown(given[key])}, must be {expected.name}"
        for key, expected in understood.items()
        if key in given and not expected.accepts(given[key])
    }
    wrong = [f"{key} is missing" for key in _needed(values, kind) if key not in given] + [*mistyped.values()]
    for key, value in given.items():
        if key not in understood and (problem := _problem(key, value, kind)):
            wrong.append(problem)
    flags = given.get("no_rope_layers")
    if FAMILIES[kind].no_rope_layers and not mistyped and flags is not None:
        n_layers = given.get("num_hidden_layers", 0)
        if len(flags) < n_layers:
            wrong.append(f"no_rope_layers has {len(flags)} entries, but num_hidden_layers is {n_layers}")
    if not mistyped:  # what these compare must have the right types
        if len({given[key] for key in ("num_experts", "num_local_experts") if key in given}) > 1:
            wrong.append("num_experts and num_local_experts differ: remove one")
        wrong += _architecture_errors(given, kind) + window_errors(given, kind) + rope_errors(rope, kind)
    return wrong


def _understood(kind: str) -> dict[str, ValueKind]:
    """Return the keys that are read of a family's config, with what they must be."""
    family = FAMILIES[kind]
    understood = _UNDERSTOOD | _UNDERSTOOD_EXPERTS[family.experts]
    if family.multipliers:
        understood |= dict.fromkeys(_MULTIPLIERS, NUMBER)
    if family.partial_rotary:
        understood["partial_rotary_factor"] = NUMBER
    if family.no_rope_layers:
        understood |= {"no_rope_layers": COUNTS, "no_rope_layer_interval": COUNT}
    return understood


def _needed(values: Mapping[str, Any], kind: str) -> list[str]:
    needed = [*_NEEDED, "max_position_embeddings"]
    if FAMILIES[kind].experts:
        needed.append("num_experts_per_tok")
        count, other = "num_experts", "num_local_experts"
        if FAMILIES[kind].experts == "qwen":
            needed.append("moe_intermediate_size")
        else:
            count, other = other, count
        if values.get(other) is None:
            needed.append(count)
    if FAMILIES[kind].needs_kv_heads and "num_key_value_heads" not in values:  # null: as many as query heads
        needed.append("num_key_value_heads")
    return needed


def _problem(key: str, value: object, kind: str) -> str | None:
    """Return why a key that is not read cannot be passed over, or None if it can."""
    if key in _ONLY:
        only = _ONLY[key]
        return None if value in only else f"{key} is {shown(value)}, a Decoder supports {only[0]!r} only"
    if key in _QUANTIZED:
        return f"{key} says {_quantization(value)}: quantized weights are not supported; load an unquantized copy"
    if key == "auto_map":
        code = (
            [name for name in value if name != "AutoTokenizer" and value[name] not in _OWN_CODE]
            if isinstance(value, Mapping)
            else [shown(value)]
        )
        return f"auto_map replaces {', '.join(code)} by code in the folder, which is not run" if code else None
    if key in _HARMLESS:
        return None
    if _DROPOUT.fullmatch(key):
        return None if NUMBER.accepts(value) else f"{key} is {shown(value)}, must be {NUMBER.name}"
    default = _default_of_transformers(kind, key)
    if default is not _MISSING and type(default) is type(value) and default == value:
        return None
    return (
        f"{key} is {shown(value)}, which is not known: if it changes nothing that the model computes, remove it from "
        "the config"
    )


def _quantization(value: object) -> str:
    if not isinstance(value, Mapping):
        return "that weights are quantized"
    method = value.get("quant_method", value.get("format"))
    bits = value.get("bits", value.get("w_bit"))
    return f"quant_method {shown(method)}" + (f", bits {shown(bits)}" if bits is not None else "")


def _architecture_errors(given: Mapping[str, Any], kind: str) -> list[str]:
    expected = FAMILIES[kind].architecture
    known = {expected.lower(), expected.replace("ForCausalLM", "Model").lower()}
    other = [name for name in given.get("architectures", ()) if name.lower() not in known]
    return [f"architectures has {', '.join(map(shown, other))}, a Decoder is a {expected}"] if other else []


def _default_of_transformers(kind: str, key: str) -> object:
    """Return the default of `key` in transformers' own config class, if that is installed and knows the key."""
    try:
        configs = importlib.import_module("transformers").AutoConfig
        return getattr(configs.for_model(kind), key, _MISSING)
    except (ImportError, RuntimeError, AttributeError):  # not installed, or not usable here
        return _MISSING
