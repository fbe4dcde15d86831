"""Tied weights of a pipeline: one weight of which two stages hold a copy.

`PipelineRun` calls `follow` before each run, `begin` and `add_up` around each training step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_parallel.plan import clean_name
from titan_parallel.tensor.styles import settle_gradients


@dataclass
class TiedStages:
    """Keep copies of a weight equal, and give them the sum of both gradients.

    On different ranks both copies get the summed gradient, so that two optimizers take equal steps. On one rank (the
    first and last stage of a V-shaped placement) the first copy is the weight: it gets the sum, and the second is set
    to it before each run.

    Attributes:
        parts: The model's parts on this rank.
        here: Pairs of names (first, second) in two different parts of this rank.
        away: Names on this rank whose copy is on another rank, with that rank within `group`.
        copies: Those of `away` that the other rank counts in norms.
        group: The ranks of the pipeline.
    """

    parts: Sequence[nn.Module]
    here: Sequence[tuple[str, str]]
    away: Mapping[str, int]
    copies: frozenset[str]
    group: dist.ProcessGroup
    _before: dict[str, Tensor | None] = field(default_factory=dict)

    @torch.no_grad()
    def follow(self) -> None:
        """Set the second copies on this rank to the first ones."""
        for first, second in self._pairs():
            _local(second).copy_(_local(first))

    def begin(self) -> None:
        """Set aside gradients accumulated earlier, which are sums over both copies already."""
        found = self._named()
        self._before = {name: found[name].grad for name in self.away}
        for name in self.away:
            found[name].grad = None

    @torch.no_grad()
    def add_up(self) -> None:
        """Give each copy the sum of both gradients."""
        found = self._named()
        for first, second in self._pairs():
            settle_gradients([first, second])
            if second.grad is not None:
                first.grad = second.grad if first.grad is None else first.grad.add_(second.grad)
                second.grad = None
        for name, peer in self.away.items():
            parameter = found[name]
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            settle_gradients([parameter])
            mine = _local(parameter.grad)
            other = torch.empty_like(mine)
            sent = mine.clone()  # a copy: the received gradient is added while this may still be in flight
            work = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, sent, group=self.group, group_peer=peer),
                    dist.P2POp(dist.irecv, other, group=self.group, group_peer=peer),
                ]
            )
            for one in work:
                one.wait()
            mine.add_(other)
            if (earlier := self._before.pop(name, None)) is not None:
                parameter.grad.add_(earlier)

    def counted_elsewhere(self) -> list[nn.Parameter]:
        """Return the parameters on this rank whose gradients another rank counts in norms."""
        found = self._named()
        return [found[name] for name in self.copies]

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        found = self._named()
        for first, second in self.here:
            if found[first] is not found[second]:
                yield found[first], found[second]

    def _named(self) -> dict[str, nn.Parameter]:
        return {
            clean_name(name): parameter
            for part in self.parts
            for name, parameter in part.named_parameters(remove_duplicate=False)
        }


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
