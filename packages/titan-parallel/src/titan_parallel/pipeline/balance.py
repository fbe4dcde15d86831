"""Which blocks are in which pipeline stage. Called by `build.make_stages`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import nn

from titan_parallel.options import PipelineOptions
from titan_parallel.plan import Roles


def split_blocks(model: nn.Module, roles: Roles, stages: int, options: PipelineOptions) -> list[list[str]]:
    """Return the names of each stage's blocks, in the model's order.

    The cost of a matrix product is proportional to its parameters, so blocks are weighted by their parameter count, and
    so are the modules before and after the blocks, except embedding tables. Of all ways to cut, the one with the least
    work in the busiest stage is chosen and, among these, the most even one.

    Args:
        model: The model, before any transform.
        roles: Its modules.
        stages: Number of stages, at most that of blocks.
        options: Split points, or the costs of the modules before and after the blocks; checked already.
    """
    blocks = roles.blocks
    if options.split:
        cuts = [0, *(blocks.index(name) for name in options.split), len(blocks)]
        return [list(blocks[start:end]) for start, end in pairwise(cuts)]
    costs = [float(_work([model.get_submodule(name)])) for name in blocks]
    unit = sum(costs) / len(costs) or 1.0
    costs = [cost / unit for cost in costs] if any(costs) else [1.0] * len(blocks)
    outer = [
        _work(model.get_submodule(name) for name in names) / unit if less is None else less
        for names, less in ((roles.before, options.first_stage_less), (roles.after, options.last_stage_less))
    ]
    sizes = balance(costs, stages, first=outer[0], last=outer[1])
    starts = [sum(sizes[:i]) for i in range(stages + 1)]
    return [list(blocks[start:end]) for start, end in pairwise(starts)]


def balance(costs: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Cut a sequence of costs into runs with the smallest largest sum and, among these, the smallest sum of squares.

    Dynamic programming over stages: for each number of blocks, the best way to distribute that many first blocks over
    the stages so far.

    Args:
        costs: Costs of the blocks in order.
        stages: Number of runs; each has at least one block.
        first: Added to the sum of the first run.
        last: Added to the sum of the last run.

    Returns:
        The length of each run.
    """
    count = len(costs)
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[i], for the first i blocks in the stages so far: (largest sum, sum of squares, lengths)
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(stages):
        extra = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        following: dict[int, tuple[float, float, list[int]]] = {}
        ends = range(stage + 1, count - (stages - stage - 1) + 1) if stage < stages - 1 else [count]
        for end in ends:
            choices = []
            for start, (largest, squares, lengths) in best.items():
                if start < end:
                    load = sums[end] - sums[start] + extra
                    choices.append((max(largest, load), squares + load * load, [*lengths, end - start]))
            # Rounded, so that rounding errors of sums do not decide between equal choices.
            following[end] = min(choices, key=lambda choice: (round(choice[0], 9), round(choice[1], 9)))
        best = following
    return best[count][2]


def _work(modules: Iterable[nn.Module]) -> int:
    """Return the number of parameters that take part in matrix products, each counted once."""
    seen: dict[int, int] = {}
    for module in modules:
        for part in module.modules():
            if not isinstance(part, nn.Embedding | nn.EmbeddingBag):
                seen.update({id(p): p.numel() for p in part.parameters(recurse=False)})
    return sum(seen.values())
