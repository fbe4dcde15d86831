"""Compilation of blocks, as graphs without breaks."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from titan_parallel.options import ParallelOptions


def compile_blocks(
    model: nn.Module, blocks: Iterable[str], options: ParallelOptions, apart: Collection[nn.Module] = ()
) -> None:
    """Compile blocks in place, when they are first called.

    A block is one graph or, if it holds modules that no graph can hold, whatever lies around them. Experts that are
    spread over ranks are such: only their data tell how many rows come to them, and FSDP gathers them by themselves.
    Then each of the block's children that holds none of them is a graph of its own, and so on down to the experts; the
    code between these graphs runs as it is.

    Args:
        model: Holds them.
        blocks: Their names.
        options: Backend, memory budget, whether collectives and products of tensor parallelism are to overlap.
        apart: Modules to leave alone.
    """
    backend: Any = options.compile_backend
    if options.memory_budget is not None or options.async_tp:
        backend = _Backend(options.compile_backend, options.memory_budget, options.async_tp)
    for name in blocks:
        block = model.get_submodule(name)
        if any(inner in apart for inner in block.modules()):
            _compile_around(block, apart, backend)
        else:
            block.compile(backend=backend, fullgraph=True)


def _compile_around(module: nn.Module, apart: Collection[nn.Module], backend: Any) -> None:
    for child in module.children():
        if child in apart:
            continue
        if isinstance(child, _CONTAINERS) or any(inner in apart for inner in child.modules()):
            _compile_around(child, apart, backend)
        else:
            # Not its call, which has the hooks: torch keeps one small set of graphs for the calls of all modules.
            child.forward = torch.compile(child.forward, backend=backend, fullgraph=True)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # are never called


@dataclass(frozen=True)
class _Backend:
    """A backend of torch.compile under settings that torch keeps for the whole process, set for its graphs only.

    A dataclass, so that equal ones share what is compiled: the blocks of a model are one code.
    """

    name: str
    memory_budget: float | None
    async_tp: bool

    def __call__(self, graph: Any, inputs: Any) -> Any:
        # What backward saves is decided together with the forward's graph, so within this call. What inductor makes of
        # the backward's graph comes later, and takes its settings along only if they are handed to it.
        patches = {"config_patches": {"_micro_pipeline_tp": True}} if self.async_tp else {}
        with self._budget():
            return torch._dynamo.lookup_backend(self.name)(graph, inputs, **patches)

    def _budget(self) -> AbstractContextManager[Any]:
        if self.memory_budget is None:
            return nullcontext()
        from torch._functorch import config  # heavy, and of use to who compiles only

        patched: AbstractContextManager[Any] = config.patch(activation_memory_budget=self.memory_budget)
        return patched
