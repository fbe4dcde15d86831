"""Activation checkpointing: which results of a block's forward are kept for its backward; the rest is recomputed.

`parallelize` calls `checkpoint_blocks` after tensor parallelism and before compilation.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from titan_parallel._torch_compat import (
    COSTLY_OPERATORS,
    MATMUL_OPERATORS,
    TorchDispatchMode,
    checkpoint_wrapper,
    is_operator,
)
from titan_parallel.errors import LayoutError
from titan_parallel.options import ParallelOptions

# Names, not operators: some exist only after the module that defines them has been imported.
_ALWAYS = COSTLY_OPERATORS | {"titan_parallel.context_attend", "titan_parallel.context_ring"}


def checkpoint_blocks(
    model: nn.Module,
    blocks: Iterable[str],
    options: ParallelOptions,
    save: Iterable[str],
    units: Collection[nn.Module] = (),
) -> None:
    """Wrap every `checkpoint_every`-th block in place, so that it keeps less for its backward.

    Args:
        model: The model that contains the blocks; parameter names seen through `clean_name` do not change.
        blocks: Names of the blocks in the model's order.
        options: The mode, and which blocks.
        save: The model's own operators whose results selective checkpointing keeps too, as `namespace.operator`.
        units: Modules within blocks that will be separate FSDP units.

    Raises:
        LayoutError: If an operator does not exist.
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
    """Return `block` wrapped so that its forward keeps only its input and, if asked, the most expensive results.

    Args:
        block: Any module.
        save: Operators whose results to keep beside those kept for any block; None keeps no result at all.
        holds_units: Whether modules in the block will be separate FSDP units.
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
        if not is_operator(getattr(known, operator, None)):
            near = difflib.get_close_matches(operator, dir(known), n=3)
            wrong.append(f"{name!r} (nearest: {', '.join(f'{namespace}.{one}' for one in near) or 'none'})")
    if wrong:
        raise LayoutError(
            f"operators to save do not exist: {'; '.join(wrong)}; use torch's names without the overload, such as "
            "'aten.mm', and import the module that defines them first"
        )


def _contexts(save: frozenset[str]) -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_save_costly(save))  # type: ignore[no-untyped-call,no-any-return]


def _contexts_over_units(save: frozenset[str]) -> tuple[Any, Any]:
    """Apply the selective contexts only to the operators that may be saved.

    torch requires that recomputation runs the same operators as forward did. FSDP adds its own, and they differ: a unit
    may be gathered when it is called, or may have been prefetched.
    """
    forward, recompute = _contexts(save)
    return _OnlyNamed(forward, save | MATMUL_OPERATORS), _OnlyNamed(recompute, save | MATMUL_OPERATORS)


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
    """Return the policy: keep the results of `save` and of every second other matrix product, recompute the rest."""
    seen = {"forward": 0, "recompute": 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = _name(op)
        if name in save:
            return CheckpointPolicy.MUST_SAVE
        if name in MATMUL_OPERATORS:
            phase = "recompute" if context.is_recompute else "forward"
            seen[phase] += 1
            if seen[phase] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _name(op: Any) -> str:
    return str(getattr(op, "overloadpacket", op))  # higher-order operators have no overloads
