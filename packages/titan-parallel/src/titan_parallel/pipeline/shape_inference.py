"""Shape inference: what stages exchange, for each microbatch of a step.

`PipelineRun` calls it at the beginning of each step; it communicates only for shapes that are new.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from titan_parallel._torch_compat import tree_leaves
from titan_parallel.autocast import autocast_key
from titan_parallel.fsdp import reshard
from titan_parallel.mesh import fsdp_mesh
from titan_parallel.pipeline.boundary import Boundary
from titan_parallel.pipeline.broadcast import broadcast_object
from titan_parallel.pipeline.stage import Stage
from titan_parallel.sequential import Microbatch


class Boundaries:
    """What stages exchange, inferred by the first stage once for each shape of a microbatch.

    Args:
        stages: The stages of this rank, by their index among all stages.
        mesh: From `build_mesh`.
        first: The rank within the pipeline that has the first stage.
    """

    def __init__(self, stages: Mapping[int, Stage], mesh: DeviceMesh, first: int) -> None:
        self._stages = stages
        self._mesh = mesh
        self._first = first
        self._group = mesh["pp"].get_group()
        self._known: dict[Hashable, Boundary] = {}

    def of(self, microbatches: Sequence[Microbatch], device: torch.device) -> list[Boundary]:
        """Return what stages exchange for each microbatch of a step.

        Raises:
            LayoutError: If stages would have to exchange more than the hidden state.
            ValueError: If microbatches have hidden states of different shapes.
        """
        casts = autocast_key(device.type)
        signatures: list[Hashable] = [(casts, _signature(microbatch)) for microbatch in microbatches]
        unknown = {s: m for s, m in zip(signatures, microbatches, strict=True) if s not in self._known}
        wanted: list[tuple[Hashable, Microbatch]] = list(unknown.items())
        if 0 in self._stages:
            # Ranks that gather weights together must run equally many forwards, whether or not they need to.
            wanted += [(None, microbatches[0])] * (self._most_forwards(len(wanted), device) - len(wanted))
        for signature, microbatch in wanted:
            found: Boundary | Exception | None = None
            if 0 in self._stages:
                found = self._infer(microbatch)
            if signature is not None:
                found = broadcast_object(found, self._group, self._first)
            if isinstance(found, Exception):
                raise found
            if signature is not None:
                assert found is not None
                self._known[signature] = found
        boundaries = [self._known[signature] for signature in signatures]
        shapes = {str(boundary.hidden) for boundary in boundaries}
        if len(shapes) > 1:
            raise ValueError(
                "pipeline parallelism requires microbatches of one step to have hidden states of one shape, but these "
                f"have {', '.join(sorted(shapes))}; pad them to equal lengths"
            )
        return boundaries

    def _infer(self, microbatch: Microbatch) -> Boundary | Exception:
        """Return the boundary inferred by the first stage, or its exception, to broadcast to the other ranks."""
        stage = self._stages[0]
        stage.microbatch = microbatch
        modes = [(module, module.training) for module in stage.modules()]
        stage.eval()  # no dropout, no running statistics
        try:
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                return stage.infer_boundary()
        except Exception as error:
            return error
        finally:
            for module, training in modes:
                module.training = training
            reshard(stage)

    def _most_forwards(self, own: int, device: torch.device) -> int:
        sharing = self._mesh[("dp_shard", "cp", "ep")].size()
        if sharing == 1:
            return own
        most = torch.tensor(own, device=device)
        mesh = fsdp_mesh(self._mesh)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=mesh.get_group(mesh.ndim - 1))
        return int(most)


def _signature(microbatch: Microbatch) -> Hashable:
    """Return the properties of a microbatch that the shape of its hidden state may depend on."""

    def describe(leaf: Any) -> Hashable:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), leaf.dtype
        return leaf if isinstance(leaf, int | str) else type(leaf).__qualname__

    keys = tuple(microbatch.kwargs)
    return keys, tuple(describe(leaf) for leaf in tree_leaves((microbatch.args, dict(microbatch.kwargs))))
