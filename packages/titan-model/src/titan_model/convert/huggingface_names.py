"""The names and shapes of a decoder's tensors in Hugging Face's transformers, as a weight map."""

from __future__ import annotations

from titan_model.config import DecoderConfig
from titan_model.convert.huggingface_config import config_to_huggingface
from titan_model.convert.huggingface_families import FAMILIES, family_of
from titan_model.convert.weight_map import Concatenated, DecoderWeightMap, Rename, StackedExperts, TensorRule, ZeroOnly

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def huggingface_map(config: DecoderConfig, *, fused_experts: bool = False) -> DecoderWeightMap:
    """Return the weight map between a decoder and its Hugging Face form, with the `config.json`.

    A tied head is not stored; files that contain a copy of it are accepted (`aliases`). The selection bias of loss-free
    balancing does not exist there: loading sets it to zero, saving a nonzero one raises an error.

    Args:
        config: The decoder's shape: one that Hugging Face's transformers has an architecture for.
        fused_experts: Whether the experts of a block are two tensors, as transformers 5 holds them in memory, and not
            three per expert, as every release of transformers writes them to files.

    Raises:
        ValueError: If transformers has no architecture for this config; the message lists every reason.
    """
    values = config_to_huggingface(config)
    rules: list[TensorRule] = [Rename(("embed.weight",), (EMBED,))]
    for layer in range(config.n_layers):
        rules += _block(config, layer, fused_experts=fused_experts)
    rules.append(Rename(("norm.weight",), ("model.norm.weight",)))
    if not config.tied_embeddings:
        rules.append(Rename(("head.weight",), (HEAD,)))
    return DecoderWeightMap(
        rules=tuple(rules),
        config=values,
        aliases={HEAD: EMBED} if config.tied_embeddings else {},
        # Frequencies, cosines and sines that releases of transformers and other programs stored as weights. They follow
        # from the config.
        ignored=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.\w+",),
    )


def _block(config: DecoderConfig, layer: int, *, fused_experts: bool) -> list[TensorRule]:
    internal_prefix, external_prefix = f"layers.{layer}", f"model.layers.{layer}"
    names = {"attn_norm.weight": "input_layernorm.weight"}
    fused = FAMILIES[family_of(config)].fused_projections
    names |= {f"attn.{kind}_proj.weight": f"self_attn.{kind}_proj.weight" for kind in ("o" if fused else "qkvo")}
    if config.qkv_bias:
        names |= {f"attn.{kind}_proj.bias": f"self_attn.{kind}_proj.bias" for kind in "qkv"}
    if config.qk_norm:
        names |= {f"attn.{kind}_norm.weight": f"self_attn.{kind}_norm.weight" for kind in "qk"}
    names["ffn_norm.weight"] = "post_attention_layernorm.weight"
    if not config.has_experts(layer):
        names |= {f"ffn.{kind}.weight": f"mlp.{kind}.weight" for kind in (_PROJECTIONS[2:] if fused else _PROJECTIONS)}
    rules: list[TensorRule] = [
        Rename((f"{internal_prefix}.{a}",), (f"{external_prefix}.{b}",)) for a, b in names.items()
    ]
    if fused:
        rules += _fused(config, internal_prefix, external_prefix)
    if config.has_experts(layer):
        # Mixtral's name in files, which transformers 5 changes in memory.
        in_files = "block_sparse_moe" if _spelled_as_mixtral(config) else "mlp"
        within = f"{external_prefix}.{'mlp' if fused_experts else in_files}"
        rules += _experts(config, f"{internal_prefix}.ffn", within, fused=fused_experts)
    return rules


def _fused(config: DecoderConfig, internal_prefix: str, external_prefix: str) -> list[TensorRule]:
    """Return the rules of projections that are one tensor each in the files (Phi-3)."""
    q_dim, kv_dim = (heads * config.attention_head_dim for heads in (config.n_heads, config.n_kv_heads))
    attention = tuple(f"{internal_prefix}.attn.{kind}_proj.weight" for kind in "qkv")
    feed_forward = tuple(f"{internal_prefix}.ffn.{kind}.weight" for kind in _PROJECTIONS[:2])
    return [
        Concatenated(attention, (f"{external_prefix}.self_attn.qkv_proj.weight",), (q_dim, kv_dim, kv_dim)),
        Concatenated(feed_forward, (f"{external_prefix}.mlp.gate_up_proj.weight",), (config.ffn_dim, config.ffn_dim)),
    ]


def _spelled_as_mixtral(config: DecoderConfig) -> bool:
    return FAMILIES[family_of(config)].experts == "mixtral"


def _experts(config: DecoderConfig, internal_prefix: str, external_prefix: str, *, fused: bool) -> list[TensorRule]:
    moe = config.moe
    assert moe is not None
    rules: list[TensorRule] = [Rename((f"{internal_prefix}.router.weight",), (f"{external_prefix}.gate.weight",))]
    if moe.balance_bias_rate:
        rules.append(ZeroOnly((f"{internal_prefix}.router.bias",), (), (moe.n_experts,)))
    internal = [f"{internal_prefix}.experts.{kind}" for kind in _PROJECTIONS]
    if fused:
        widths, name = (moe.ffn_dim, moe.ffn_dim), f"{external_prefix}.experts.gate_up_proj"
        rules.append(Concatenated((internal[0], internal[1]), (name,), widths, dim=1))
        rules.append(Rename((internal[2],), (f"{external_prefix}.experts.down_proj",)))
        return rules
    kinds = ("w1", "w3", "w2") if _spelled_as_mixtral(config) else _PROJECTIONS
    for name, kind in zip(internal, kinds, strict=True):
        each = tuple(f"{external_prefix}.experts.{expert}.{kind}.weight" for expert in range(moe.n_experts))
        rules.append(StackedExperts((name,), each))
    return rules
