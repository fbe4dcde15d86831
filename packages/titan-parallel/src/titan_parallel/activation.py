"""Activation checkpointing: what a block keeps for its backward, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
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
        "aten::_grouped_mm",
        "_c10d_functional::reduce_scatter_tensor",
        "_c10d_functional::all_to_all_single",
    }
)
_EVERY_SECOND = frozenset({"aten::mm", "aten::addmm"})


def checkpoint_block(block: nn.Module, mode: ActivationCheckpointing, *, holds_units: bool = False) -> nn.Module:
    """Return `block` wrapped to keep less for its backward; parameter names seen through `clean_name` stay.

    Args:
        block: The block.
        mode: What to keep.
        holds_units: Whether modules in the block will be FSDP units of their own.
    """
    if mode == "none":
        return block
    if mode == "full":
        return checkpoint_wrapper(block, preserve_rng_state=True)
    return checkpoint_wrapper(
        block, preserve_rng_state=True, context_fn=_selective_over_units if holds_units else _selective_contexts
    )


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_save_costly())  # type: ignore[no-untyped-call,no-any-return]


def _selective_over_units() -> tuple[Any, Any]:
    """Have only the operators looked at that may be saved.

    torch holds that recomputation runs the same operators as forward did. But FSDP runs others of its own: whether it
    gathers a unit just when that is called, or did so before, differs.
    """
    forward, recompute = _selective_contexts()
    return _OnlyNamed(forward), _OnlyNamed(recompute)


class _OnlyNamed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in _ALWAYS | _EVERY_SECOND:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


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
