"""Compilation of blocks by torch.compile, as graphs without breaks.

`parallelize` calls `compile_blocks` after activation checkpointing and before FSDP.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from titan_parallel._torch_compat import compile_graph, memory_budget
from titan_parallel.options import ParallelOptions


def compile_blocks(
    model: nn.Module, blocks: Iterable[str], options: ParallelOptions, apart: Collection[nn.Module] = ()
) -> None:
    """Compile blocks in place; compilation happens when they are first called.

    A block is one graph, unless it contains modules that no graph can contain. Experts distributed over ranks are such:
    the number of rows that they get depends on the data, and FSDP gathers them separately. Then each child of the block
    that contains none of them is one graph, and so on down to the experts; the code between these graphs runs eagerly.

    Args:
        model: The model that contains the blocks.
        blocks: Their names.
        options: Backend, memory budget, and whether tensor-parallel collectives and products overlap.
        apart: Modules to leave out of all graphs.
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
            # `forward` and not the module's call: torch keeps one small cache of graphs for the calls of all modules.
            child.forward = torch.compile(child.forward, backend=backend, fullgraph=True)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # never called themselves


@dataclass(frozen=True)
class _Backend:
    """A backend of torch.compile with settings that torch keeps per process, applied to these graphs only.

    A dataclass, so that equal backends share compiled code: all blocks of a model are one function.
    """

    name: str
    memory_budget: float | None
    async_tp: bool

    def __call__(self, graph: Any, inputs: Any) -> Any:
        # The budget decides what forward saves, which happens within this call.
        with nullcontext() if self.memory_budget is None else memory_budget(self.memory_budget):
            return compile_graph(self.name, graph, inputs, async_tp=self.async_tp)
