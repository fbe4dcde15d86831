"""Finding out what passes between stages, for each microbatch of a step."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves

from titan_parallel.fsdp import reshard
from titan_parallel.mesh import fsdp_mesh
from titan_parallel.pipeline.boundary import Boundary
from titan_parallel.pipeline.broadcast import share_object
from titan_parallel.pipeline.stage import Stage
from titan_parallel.sequential import Microbatch


class Boundaries:
    """What passes between stages, which the first one finds out once for each shape of microbatch.

    Args:
        stages: Those of this rank, by their place among all stages.
        mesh: From `build_mesh`.
        first: The rank of the pipeline with the first stage.
    """

    def __init__(self, stages: Mapping[int, Stage], mesh: DeviceMesh, first: int) -> None:
        self._stages = stages
        self._mesh = mesh
        self._first = first
        self._group = mesh["pp"].get_group()
        self._known: dict[Hashable, Boundary] = {}

    def of(self, microbatches: Sequence[Microbatch], device: torch.device) -> list[Boundary]:
        """Return what passes between stages for each microbatch of a step.

        Raises:
            LayoutError: If more than the hidden state would have to pass.
            ValueError: If microbatches have hidden states of different shapes.
        """
        signatures = [_signature(microbatch) for microbatch in microbatches]
        unknown = {s: m for s, m in zip(signatures, microbatches, strict=True) if s not in self._known}
        looks = list(unknown.items())
        if 0 in self._stages:
            # Ranks that gather weights together have to look together, whether or not they need to.
            looks += [(None, microbatches[0])] * (self._most_looks(len(looks), device) - len(looks))
        for signature, microbatch in looks:
            found: Boundary | Exception | None = None
            if 0 in self._stages:
                found = self._try_to_look(microbatch)
            if signature is not None:
                found = share_object(found, self._group, self._first)
            if isinstance(found, Exception):
                raise found
            if signature is not None:
                assert found is not None
                self._known[signature] = found
        boundaries = [self._known[signature] for signature in signatures]
        shapes = {str(boundary.hidden) for boundary in boundaries}
        if len(shapes) > 1:
            raise ValueError(
                "the microbatches of one step have to give hidden states of one shape under pipeline parallelism, but "
                f"these give {', '.join(sorted(shapes))}: pad them to equal lengths"
            )
        return boundaries

    def _try_to_look(self, microbatch: Microbatch) -> Boundary | Exception:
        """Return what the first stage finds, or what went wrong, for the other ranks to know."""
        stage = self._stages[0]
        stage.microbatch = microbatch
        modes = [(module, module.training) for module in stage.modules()]
        stage.eval()  # so that nothing is counted, drawn or averaged
        try:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                return stage.look()
        except Exception as error:
            return error
        finally:
            for module, training in modes:
                module.training = training
            reshard(stage)

    def _most_looks(self, own: int, device: torch.device) -> int:
        sharing = self._mesh[("dp_shard", "cp", "ep")].size()
        if sharing == 1:
            return own
        most = torch.tensor(own, device=device)
        mesh = fsdp_mesh(self._mesh)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=mesh.get_group(mesh.ndim - 1))
        return int(most)


def _signature(microbatch: Microbatch) -> Hashable:
    """Return what the shape of a microbatch's hidden state may depend on."""

    def describe(leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), leaf.dtype
        return leaf if isinstance(leaf, int | str) else type(leaf).__qualname__

    keys = tuple(microbatch.kwargs)
    return keys, tuple(describe(leaf) for leaf in tree_leaves((microbatch.args, dict(microbatch.kwargs))))
