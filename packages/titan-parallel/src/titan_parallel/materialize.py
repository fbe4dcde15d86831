"""Memory for a model built on meta: allocated, and the buffers that are in no file filled.

`ParallelModel.materialize` calls `materialize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_parallel.errors import LayoutError
from titan_parallel.plan import clean_name
from titan_parallel.tied_weights import tie_weights


@torch.no_grad()
def materialize(
    parts: Sequence[nn.Module],
    tied: Sequence[tuple[str, str]],
    *,
    device: torch.device | str,
    offloads: bool,
    buffers: Mapping[str, Tensor],
) -> None:
    """Allocate the tensors of parts of a model that are on meta; other tensors keep their values.

    Args:
        parts: The parts of the model on this rank.
        tied: Pairs (alias, owner) of parameters that are one weight.
        device: Where to allocate.
        offloads: Whether parameters are allocated in host memory.
        buffers: Values of non-persistent buffers, by their names in the original model.

    Raises:
        LayoutError: If non-persistent buffers are neither given nor recomputed.
    """
    for part in parts:
        filled = [(name, tensor) for name, tensor in _tensors(part) if not tensor.is_meta]
        lost = [name for name, module, key in _in_no_file(part) if module.get_buffer(key).is_meta]
        part.to_empty(device=torch.device("cpu" if offloads else device))
        for module in part.modules() if offloads else ():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        new = dict(_tensors(part))
        for name, tensor in filled:
            new[name].copy_(tensor)
        names = {clean_name(name) for name, _ in part.named_parameters(remove_duplicate=False)}
        # `to_empty` makes two tensors of a tied one.
        tie_weights(part, [pair for pair in tied if names.issuperset(pair)])
        _fill(part, frozenset(lost), buffers, device)
    _share_buffers(parts)


def _tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters(remove_duplicate=False)
    yield from part.named_buffers(remove_duplicate=False)


def _in_no_file(part: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name, module, name within the module) of each non-persistent buffer: a state dict does not contain it."""
    for prefix, module in part.named_modules(remove_duplicate=False):
        for key, _ in module.named_buffers(recurse=False):
            if key in module._non_persistent_buffers_set:
                yield f"{prefix}.{key}" if prefix else key, module, key


def _fill(part: nn.Module, lost: frozenset[str], given: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Fill the lost buffers: with given values, by the module's `reset_buffers`, or as `transformers` does."""
    absent = []
    initialize: Any = getattr(part, "_init_weights", None)  # of `transformers`, also for buffers
    for name, module, key in [one for one in _in_no_file(part) if one[0] in lost]:
        original = clean_name(name)
        buffer = module.get_buffer(key)
        if original in given:
            _copy(original, given[original], buffer)
            continue
        if callable(reset := getattr(module, "reset_buffers", None)):
            reset(device)
            continue
        _mark(buffer)
        if initialize is not None and next(module.parameters(), None) is None:
            initialize(module)
        if _is_marked(module.get_buffer(key)):
            absent.append(original)
    if absent:
        raise LayoutError(
            f"materialize: {', '.join(absent)}: no state dict contains these buffers, and nothing says how to compute "
            "them; pass their values, materialize(device, buffers={name: tensor}), or give their modules a method "
            "reset_buffers(device) that fills them"
        )


def _copy(name: str, value: Tensor, buffer: Tensor) -> None:
    if value.shape != buffer.shape:
        raise LayoutError(f"materialize: buffers[{name!r}] is {list(value.shape)}, not {list(buffer.shape)}")
    buffer.copy_(value)


_MARK = 85  # of integers


def _mark(buffer: Tensor) -> None:
    """Fill a buffer so that it is recognized if nothing fills it afterwards."""
    buffer.fill_(torch.nan if buffer.is_floating_point() else 0 if buffer.dtype is torch.bool else _MARK)


def _is_marked(buffer: Tensor) -> bool:
    if buffer.is_floating_point():
        marked = buffer.isnan()
    else:
        marked = ~buffer if buffer.dtype is torch.bool else buffer == _MARK
    return bool(buffer.numel()) and bool(marked.all())


def _share_buffers(parts: Sequence[nn.Module]) -> None:
    """Let parts that have a buffer in common hold one tensor, so that it is initialized once."""
    first: dict[str, Tensor] = {}
    for part in parts:
        for name, buffer in list(part.named_buffers()):
            kept = first.setdefault(clean_name(name), buffer)
            module, _, key = name.rpartition(".")
            setattr(part.get_submodule(module), key, kept)
