"""Activation checkpointing: what a block keeps for its backward, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from titan_parallel.options import ActivationCheckpointing

# By name: some operators are there only once whoever defines them has been imported.
_ALWAYS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "torch_attn::_varlen_attn",
        "titan_model::document_attention",
        "titan_parallel::context_attend",
        "titan_parallel::context_ring",
        "aten::_grouped_mm",
        "_c10d_functional::reduce_scatter_tensor",
    }
)
_EVERY_SECOND = frozenset({"aten::mm", "aten::addmm"})


def checkpoint_block(block: nn.Module, mode: ActivationCheckpointing) -> nn.Module:
    """Return `block` wrapped to keep less for its backward; parameter names seen through `clean_name` stay."""
    if mode == "none":
        return block
    if mode == "full":
        return checkpoint_wrapper(block, preserve_rng_state=True)
    return checkpoint_wrapper(block, preserve_rng_state=True, context_fn=_selective_contexts)


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_save_costly())  # type: ignore[no-untyped-call,no-any-return]


def _save_costly() -> Callable[..., CheckpointPolicy]:
    """Save what costs most to compute again for its size: attention, products of experts, every second other one."""
    seen = {"forward": 0, "recompute": 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.name()
        if name in _ALWAYS:
            return CheckpointPolicy.MUST_SAVE
        if name in _EVERY_SECOND:
            phase = "recompute" if context.is_recompute else "forward"
            seen[phase] += 1
            if seen[phase] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
