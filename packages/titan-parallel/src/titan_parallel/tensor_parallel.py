"""Tensor and sequence parallelism: from the plan's words to torch's parallel styles.

Between blocks activations stay DTensors, sharded over the sequence (or replicated, without sequence parallelism). A
plain tensor there would hide the collective still in flight from torch.compile, which breaks its backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from titan_parallel.plan import match_modules

_SEQUENCE_DIM = 1  # activations are [B, S, ...]


def apply_tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, str], *, sequence_parallel: bool
) -> None:
    """Split the modules of `model` in place.

    Args:
        model: On any device, meta included. Real weights are taken from the first rank of the mesh.
        mesh: The one-dimensional tensor-parallel mesh.
        styles: Module-name patterns to the words of `ParallelPlan.tensor`.
        sequence_parallel: Whether activations between blocks are split over the sequence.
    """
    words = _styles(sequence_parallel)
    by_name = {name: words[style] for pattern, style in styles.items() for name in match_modules(model, [pattern])}
    parallelize_module(model, mesh, by_name)


def _styles(sequence_parallel: bool) -> dict[str, ParallelStyle]:
    between: Placement = Shard(_SEQUENCE_DIM) if sequence_parallel else Replicate()
    return {
        "vocab": RowwiseParallel(input_layouts=Replicate(), output_layouts=between, use_local_output=False),
        "sequence": _PerPosition(between),
        "gather": _WholeSequence(),
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(output_layouts=between, use_local_output=False),
        "logits": _Logits(output_layouts=Shard(-1), use_local_output=False),
    }


class _PerPosition(ParallelStyle):
    """Runs a module on activations as they lie between blocks, its parameters the same on every rank.

    torch's SequenceParallel is this for a sharded sequence only.
    """

    def __init__(self, layout: Placement) -> None:
        super().__init__()
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._replicate, self._take)

    def _replicate(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))

    def _take(self, module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> Any:
        first, *rest = inputs
        if not isinstance(first, DTensor):
            first = DTensor.from_local(first, mesh, [self.layout], run_check=False)
        return (first, *rest)


class _WholeSequence(ParallelStyle):
    """Gathers once what a module's children would otherwise each gather for themselves."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(_gather_inputs, with_kwargs=True)
        return module


class _Logits(ColwiseParallel):
    """A linear split over its outputs, which stay split; its input is gathered as by `_WholeSequence`."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(_gather_inputs, with_kwargs=True)
        return super()._apply(module, device_mesh)


def _gather_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_gathered(x) for x in args), {key: _gathered(x) for key, x in kwargs.items()}


def _gathered(x: object) -> object:
    if not isinstance(x, DTensor):
        return x
    if not x.placements[0].is_replicate():
        return x.redistribute(placements=[Replicate()])
    # Whole already, but the children's gradients are partial sums. Passing through a plain tensor sums them here, once;
    # left partial they would reach the embedding, whose backward does not take them.
    return DTensor.from_local(x.to_local(), x.device_mesh, x.placements, run_check=False)


def to_full(x: Tensor) -> Tensor:
    """Return `x` as a plain tensor, gathered from all ranks if it is a DTensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x
