"""The plan of a Hugging Face model, derived from the model's own plans. `transformers` is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from titan_parallel.errors import LayoutError
from titan_parallel.plan import ParallelPlan

# transformers' styles inside a block, and ours. Those of mixtures of experts are missing.
_STYLES = {"colwise": "colwise", "rowwise": "rowwise", "replicated_with_grad_allreduce": "local"}


def plan_from_transformers(model: nn.Module, *, tensor: bool = True) -> ParallelPlan:
    """Derive the plan of a causal language model of Hugging Face's `transformers` from its own plans.

    Its config defines how the projections of a block are split (`base_model_tp_plan`) and the order of modules
    (`base_model_pp_plan`). The rest is derived from the modules: a module that contains a `colwise` projection needs
    the full sequence, and norms between blocks treat each position separately.

    Args:
        model: A model such as `LlamaForCausalLM`, on any device, meta included.
        tensor: Whether to include tensor-parallel styles. Without them the plan is for layouts with tp 1, and styles
            that titan-parallel does not support are ignored.

    Returns:
        The plan, a dict that you may change.

    Raises:
        LayoutError: If the model's config has no such plans, or they use a style that titan-parallel does not support.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
        >>> plan = plan_from_transformers(LlamaForCausalLM(config))
        >>> plan["blocks"], plan["before"], plan["after"]
        (['model.layers.*'], ['model.embed_tokens'], ['model.norm', 'lm_head'])
        >>> plan["tensor"]["model.layers.*.mlp.down_proj"]
        'rowwise'
    """
    config: Any = getattr(model, "config", None)
    styles: Mapping[str, str] | None = getattr(config, "base_model_tp_plan", None)
    order: Mapping[str, Any] | None = getattr(config, "base_model_pp_plan", None)
    if (tensor and not styles) or not order:
        raise LayoutError(
            f"{type(model).__name__}: its config has no base_model_tp_plan or no base_model_pp_plan to derive a plan "
            "from; write the plan by hand"
        )
    styles = styles if tensor and styles else {}
    unknown = sorted(set(styles.values()) - _STYLES.keys())
    if unknown:
        raise LayoutError(
            f"{type(model).__name__}: its base_model_tp_plan uses the styles {unknown}, which titan-parallel does not "
            "support; write plan['tensor'] by hand, or pass tensor=False and set tp=1"
        )
    base = f"{model.base_model_prefix}." if hasattr(model, str(model.base_model_prefix)) else ""
    modules = [f"{base}{name}" for name in order]
    (stack,) = [name for name in modules if isinstance(model.get_submodule(name), nn.ModuleList)]
    head = _name_of(model, _called(model, "get_output_embeddings"))
    table = _name_of(model, _called(model, "get_input_embeddings"))
    before, after = modules[: modules.index(stack)], modules[modules.index(stack) + 1 :]
    tied = head is not None and model.get_submodule(head).weight is model.get_submodule(str(table)).weight
    return {
        "blocks": [f"{stack}.*"],
        "before": before,
        "after": [*after, head] if head else after,
        "tensor": {
            **{name: "vocab" for name in before if isinstance(model.get_submodule(name), nn.Embedding)},
            **_block_styles(model, stack, {f"{base}{name}": _STYLES[style] for name, style in styles.items()}),
            **dict.fromkeys(after, "sequence"),
            **({head: "logits"} if head else {}),
        }
        if tensor
        else {},
        "tied": [(f"{head}.weight", f"{table}.weight")] if tied else [],
        "divisible": {
            "heads (num_attention_heads)": config.num_attention_heads,
            "key/value heads (num_key_value_heads)": config.num_key_value_heads,
            "vocabulary (vocab_size)": config.vocab_size,
        },
        "heads": (config.num_attention_heads, config.num_key_value_heads),
        "sequence": {"input_ids": 1, "position_ids": 1, "target": 1},
        "positions": "position_ids",
    }


def _block_styles(model: nn.Module, stack: str, styles: Mapping[str, str]) -> dict[str, str]:
    """Return the styles of a block's modules: norms, modules that gather, then those of the model's own plan."""
    first = next(iter(model.get_submodule(stack).children()))
    # A child of a block whose parameters are all vectors is a norm, whatever the name of its class.
    norms = [
        name
        for name, child in first.named_children()
        if (vectors := [parameter.ndim for parameter in child.parameters()]) and max(vectors) == 1
    ]
    # Patterns may name modules that other models of the family have, but not this one.
    here = {name: style for name, style in styles.items() if _has(model, name.replace("*", "0"))}
    gathers = {name.rpartition(".")[0]: "gather" for name, style in here.items() if style == "colwise"}
    return {**{f"{stack}.*.{name}": "sequence" for name in norms}, **gathers, **here}


def _has(model: nn.Module, name: str) -> bool:
    return name in dict(model.named_modules())


def _called(model: nn.Module, method: str) -> nn.Module | None:
    found: nn.Module | None = getattr(model, method)()
    return found


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, other in model.named_modules() if other is module), None)
