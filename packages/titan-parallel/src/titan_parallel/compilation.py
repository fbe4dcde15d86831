"""Compilation of blocks, each as one graph."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from titan_parallel.options import ParallelOptions


def compile_blocks(model: nn.Module, blocks: Iterable[str], options: ParallelOptions) -> None:
    """Compile blocks in place, when they are first called.

    Args:
        model: Holds them.
        blocks: Their names.
        options: Backend, memory budget, whether collectives and products of tensor parallelism are to overlap.
    """
    backend: Any = options.compile_backend
    if options.memory_budget is not None or options.async_tp:
        backend = _Backend(options.compile_backend, options.memory_budget, options.async_tp)
    for name in blocks:
        model.get_submodule(name).compile(backend=backend, fullgraph=True)


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
