"""torch.compile of blocks, as graphs without breaks."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn


def compile_block(block: nn.Module, apart: Collection[nn.Module], backend: str) -> None:
    """Compile a block in place: as one graph or, if it holds modules that no graph can hold, whatever lies around them.

    Experts that are spread over ranks are such: only their data tell how many rows come to them, and FSDP gathers them
    by themselves. Then each of the block's children that holds none of them is a graph of its own, and so on down to
    the experts; the code between these graphs runs as it is.

    Args:
        block: The block, or what wraps it.
        apart: Modules to leave alone.
        backend: Backend of torch.compile.
    """
    if any(inner in apart for inner in block.modules()):
        _compile_around(block, apart, backend)
    else:
        block.compile(backend=backend, fullgraph=True)


def _compile_around(module: nn.Module, apart: Collection[nn.Module], backend: str) -> None:
    for child in module.children():
        if child in apart:
            continue
        if isinstance(child, _CONTAINERS) or any(inner in apart for inner in child.modules()):
            _compile_around(child, apart, backend)
        else:
            # Not its call, which has the hooks: torch keeps one small set of graphs for the calls of all modules.
            child.forward = torch.compile(child.forward, backend=backend, fullgraph=True)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # are never called
