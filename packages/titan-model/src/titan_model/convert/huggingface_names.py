"""What Hugging Face's transformers calls a decoder's tensors."""

from __future__ import annotations

from titan_model.config import DecoderConfig
from titan_model.convert.huggingface_config import config_to_huggingface
from titan_model.convert.weight_map import FusedExperts, Rename, StackedExperts, TensorRule, WeightMap, ZeroOnly

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def huggingface_map(config: DecoderConfig, *, fused_experts: bool = False) -> WeightMap:
    """Return the rules and the `config.json` of a model's Hugging Face form.

    A tied head has no name of its own there; files that hold a copy of it are read (`aliases`). The selection bias of
    loss-free balancing has no place in Qwen3-MoE: reading sets it to zero, writing one that is not zero is an error.

    Args:
        config: The decoder's shape: a Llama, Qwen3 or Qwen3-MoE.
        fused_experts: Whether the experts of a block are two tensors, as transformers 5 holds them in memory, and not
            three for each expert, as every release of transformers writes them to files.

    Raises:
        ValueError: If transformers has no such model; the message lists every reason.
    """
    values = config_to_huggingface(config)
    rules: list[TensorRule] = [Rename(("embed.weight",), (EMBED,))]
    for layer in range(config.n_layers):
        rules += _block(config, layer, fused_experts)
    rules.append(Rename(("norm.weight",), ("model.norm.weight",)))
    if not config.tied_embeddings:
        rules.append(Rename(("head.weight",), (HEAD,)))
    return WeightMap(
        rules=tuple(rules),
        config=values,
        aliases={HEAD: EMBED} if config.tied_embeddings else {},
        # Rotary frequencies, which early releases of transformers wrote as if they were weights.
        ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    )


def _block(config: DecoderConfig, layer: int, fused_experts: bool) -> list[TensorRule]:
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
    names = {"attn_norm.weight": "input_layernorm.weight"}
    names |= {f"attn.{kind}_proj.weight": f"self_attn.{kind}_proj.weight" for kind in "qkvo"}
    if config.qk_norm:
        names |= {f"attn.{kind}_norm.weight": f"self_attn.{kind}_norm.weight" for kind in "qk"}
    names["ffn_norm.weight"] = "post_attention_layernorm.weight"
    if not config.has_experts(layer):
        names |= {f"ffn.{kind}.weight": f"mlp.{kind}.weight" for kind in _PROJECTIONS}
    rules: list[TensorRule] = [Rename((f"{ours}.{a}",), (f"{theirs}.{b}",)) for a, b in names.items()]
    if config.has_experts(layer):
        rules += _experts(config, f"{ours}.ffn", f"{theirs}.mlp", fused_experts)
    return rules


def _experts(config: DecoderConfig, ours: str, theirs: str, fused: bool) -> list[TensorRule]:
    moe = config.moe
    assert moe is not None
    rules: list[TensorRule] = [Rename((f"{ours}.router.weight",), (f"{theirs}.gate.weight",))]
    if moe.balance_bias_rate:
        rules.append(ZeroOnly((f"{ours}.router.bias",), (), (moe.n_experts,)))
    native = [f"{ours}.experts.{kind}" for kind in _PROJECTIONS]
    if fused:
        rules.append(FusedExperts((native[0], native[1]), (f"{theirs}.experts.gate_up_proj",)))
        rules.append(Rename((native[2],), (f"{theirs}.experts.down_proj",)))
        return rules
    for name, kind in zip(native, _PROJECTIONS, strict=True):
        each = tuple(f"{theirs}.experts.{expert}.{kind}.weight" for expert in range(moe.n_experts))
        rules.append(StackedExperts((name,), each))
    return rules
