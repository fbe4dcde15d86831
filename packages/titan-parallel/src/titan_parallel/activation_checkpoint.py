"""Activation checkpointing: what a block keeps for its backward, and what it computes again."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from titan_parallel.errors import LayoutError
from titan_parallel.options import ParallelOptions

# By name: some operators are there only once whoever defines them has been imported.
_ALWAYS = frozenset(
    {
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "torch_attn._varlen_attn",
        "titan_parallel.context_attend",
        "titan_parallel.context_ring",
        "aten._grouped_mm",
        "_c10d_functional.reduce_scatter_tensor",
        "_c10d_functional.all_to_all_single",
    }
)
_EVERY_SECOND = frozenset({"aten.mm", "aten.addmm", "aten._scaled_mm"})


def checkpoint_blocks(
    model: nn.Module,
    blocks: Iterable[str],
    options: ParallelOptions,
    save: Iterable[str],
    units: Collection[nn.Module] = (),
) -> None:
    """Wrap every `checkpoint_every`-th block to keep less for its backward, in place.

    Args:
        model: Holds the blocks; parameter names seen through `clean_name` stay.
        blocks: Their names in the model's order.
        options: Says how.
        save: Operators of the model's own that selective checkpointing saves too, as `namespace.operator`.
        units: Modules within blocks that will be FSDP units of their own.

    Raises:
        LayoutError: If there is no such operator.
    """
    names = frozenset([*save, *options.save_ops])
    _check_operators(names)
    if options.activation_checkpointing not in ("full", "selective"):
        return
    for i, name in enumerate(blocks):
        if i % options.checkpoint_every == 0:
            block = model.get_submodule(name)
            chosen = names if options.activation_checkpointing == "selective" else None
            holds_units = any(module in units for module in block.modules())
            model.set_submodule(name, checkpoint_block(block, chosen, holds_units=holds_units))


def checkpoint_block(block: nn.Module, save: frozenset[str] | None, *, holds_units: bool = False) -> nn.Module:
    """Return `block` wrapped to keep of its forward only its input or, beside it, what costs most to compute again.

    Args:
        block: Any module.
        save: Operators to save beside those that any block's are; None saves no result at all.
        holds_units: Whether modules in the block will be FSDP units of their own.
    """
    if save is None:
        return checkpoint_wrapper(block, preserve_rng_state=True)
    contexts = _contexts_over_units if holds_units else _contexts
    return checkpoint_wrapper(block, preserve_rng_state=True, context_fn=partial(contexts, _ALWAYS | save))


def _check_operators(names: Iterable[str]) -> None:
    wrong = []
    for name in sorted(names):
        namespace, _, operator = name.partition(".")
        known = getattr(torch.ops, namespace)
        if not isinstance(getattr(known, operator, None), torch._ops.OpOverloadPacket):
            near = difflib.get_close_matches(operator, dir(known), n=3)
            wrong.append(f"{name!r} (nearest: {', '.join(f'{namespace}.{one}' for one in near) or 'none'})")
    if wrong:
        raise LayoutError(
            f"there are no such operators to save: {'; '.join(wrong)}; name them as torch does without the overload, "
            "'aten.mm', and import what defines them before"
        )


def _contexts(save: frozenset[str]) -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_save_costly(save))  # type: ignore[no-untyped-call,no-any-return]


def _contexts_over_units(save: frozenset[str]) -> tuple[Any, Any]:
    """Have only the operators looked at that may be saved.

    torch holds that recomputation runs the same operators as forward did. But FSDP runs others of its own: whether it
    gathers a unit just when that is called, or did so before, differs.
    """
    forward, recompute = _contexts(save)
    return _OnlyNamed(forward, save | _EVERY_SECOND), _OnlyNamed(recompute, save | _EVERY_SECOND)


class _OnlyNamed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, mode: TorchDispatchMode, names: frozenset[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mode = mode
        self.names = names

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _name(func) in self.names:
            return self.mode.__torch_dispatch__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


def _save_costly(save: frozenset[str]) -> Callable[..., CheckpointPolicy]:
    """Save what costs most to compute again for its size: `save`, and every second of the other matrix products."""
    seen = {"forward": 0, "recompute": 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = _name(op)
        if name in save:
            return CheckpointPolicy.MUST_SAVE
        if name in _EVERY_SECOND:
            phase = "recompute" if context.is_recompute else "forward"
            seen[phase] += 1
            if seen[phase] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _name(op: Any) -> str:
    return str(getattr(op, "overloadpacket", op))  # operators that take functions have no overloads
