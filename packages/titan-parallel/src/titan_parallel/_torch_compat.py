"""Every private API of torch that this package uses: if a torch release breaks one, this is the file to fix.

Works with torch 2.11 (the oldest supported) to 2.15 (the newest tested). Each entry says what it is for and what would
make it unnecessary. torch.distributed.pipelining takes seconds to import, so its entries import it when called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "ATEN",
    "COSTLY_OPERATORS",
    "MATMUL_OPERATORS",
    "WRAPPER_NAMES",
    "AsyncCollectiveTensor",
    "ColwiseAnyOutput",
    "NoSelfGreeting",
    "Style",
    "TorchDispatchMode",
    "all_reduce_sum",
    "all_to_all_rows",
    "check_schedule",
    "checkpoint_wrapper",
    "compile_graph",
    "concatenate_meshes",
    "csv_schedule_class",
    "default_store",
    "flatten_mesh",
    "group_of_name",
    "is_operator",
    "load_csv_schedule",
    "memory_budget",
    "multiply_all",
    "norms_of_all",
    "reorder_schedule",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "unflatten_mesh",
]

# Re-exported as they are. `AsyncCollectiveTensor`: DTensor hands out collectives that are still in flight as this
# subclass; there is no public name. `checkpoint_wrapper`: the public `torch.utils.checkpoint.checkpoint` is a function
# and has no module that keeps parameter names. `TorchDispatchMode` and pytree: in the docs' examples, without a public
# name.

WRAPPER_NAMES = ("_checkpoint_wrapped_module", "_orig_mod")
"""Attributes under which checkpoint_wrapper and torch.compile hold the module they wrap, part of parameter names."""

ATEN: Any = torch.ops.aten
"""Operators below PyTorch's functions. Its attention kernels, `_scaled_dot_product_*`, are used for their second result
(the log-sum-exp of the scores), which `torch.nn.functional.scaled_dot_product_attention` does not return."""

COSTLY_OPERATORS = frozenset(
    {
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "torch_attn._varlen_attn",
        "aten._grouped_mm",
        "_c10d_functional.reduce_scatter_tensor",
        "_c10d_functional.all_to_all_single",
    }
)
"""Names of torch's operators that are expensive to recompute. An unknown name does no harm: nothing matches it."""

MATMUL_OPERATORS = frozenset({"aten.mm", "aten.addmm", "aten._scaled_mm"})
"""Names of torch's other matrix products."""


def is_operator(found: object) -> bool:
    """Return whether an attribute of `torch.ops.<namespace>` is an operator; there is no public type of operators."""
    return isinstance(found, torch._ops.OpOverloadPacket)


# Device meshes. torch 2.11 to 2.15: `DeviceMesh._flatten`, `_unflatten` and `_concatenate` have no public names yet.


def flatten_mesh(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Return the ranks of a mesh as a mesh of one dim."""
    return mesh._flatten(name)


def unflatten_mesh(mesh: DeviceMesh, sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Return the ranks of a mesh of one dim as a mesh of several."""
    unflattened: DeviceMesh = mesh._unflatten(0, sizes, names)
    return unflattened


def concatenate_meshes(meshes: Sequence[DeviceMesh]) -> DeviceMesh:
    """Return one mesh with the dims of several submeshes of one mesh, in their order."""
    return DeviceMesh._concatenate(list(meshes))


# Collectives inside custom operators and autograd functions.


def group_of_name(name: str) -> ProcessGroup:
    """Return a process group by its `group_name`: custom operators take strings, not groups."""
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    group: ProcessGroup = resolve(name)
    return group


def all_to_all_rows(x: Tensor, output_sizes: list[int], input_sizes: list[int], group_name: str) -> Tensor:
    """Exchange rows of `x`, by the functional operator: selective checkpointing can save the results of that one only.

    Args:
        x: `[sum(input_sizes), ...]`.
        output_sizes: Rows to receive from each rank.
        input_sizes: Rows to send to each rank.
        group_name: Name of the process group.
    """
    ops: Any = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.all_to_all_single(x.contiguous(), output_sizes, input_sizes, group_name))
    return out


def all_reduce_sum(x: Tensor, group_name: str) -> Tensor:
    """Return the sum of `x` over the ranks of a group, as a new tensor, by an operator that torch.compile takes."""
    ops: Any = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group_name))
    return out


def default_store() -> Any:
    """Return the store that the default process group was made with; there is no public name, up to torch 2.15."""
    store: Any = distributed_c10d._get_default_store()
    return store


# Many small tensors in one kernel, as in torch's own optimizers and clipping; `torch._foreach_*` has no public names.


def multiply_all(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors of one device in place."""
    torch._foreach_mul_(tensors, factor)


def norms_of_all(tensors: list[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each tensor, in fp32 whatever their dtype."""
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32))


# torch.compile.


def compile_graph(backend: str, graph: Any, inputs: Any, *, async_tp: bool) -> Any:
    """Compile a graph by a backend of torch.compile, with inductor's async tensor parallelism if `async_tp`.

    Settings of `torch._inductor.config` hold for the whole process. As one of `config_patches`, `_micro_pipeline_tp`
    holds for this graph only, and reaches its backward graph, which is compiled later.
    """
    patches = {"config_patches": {"_micro_pipeline_tp": True}} if async_tp else {}
    return torch._dynamo.lookup_backend(backend)(graph, inputs, **patches)


def memory_budget(fraction: float) -> AbstractContextManager[Any]:
    """Return a context in which compiled graphs keep at most this fraction of their activations; no public name."""
    from torch._functorch import config  # slow to import

    patched: AbstractContextManager[Any] = config.patch(activation_memory_budget=fraction)
    return patched


# Tensor-parallel styles: `parallelize_module` calls `_apply`, which torch documents as what a style implements.


class Style(ParallelStyle):
    """Base of this package's own styles."""

    def apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        """Change a module in place and return it."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self.apply(module, device_mesh)


class ColwiseAnyOutput(ColwiseParallel):
    """`ColwiseParallel` for a module that may return something else than a DTensor, which passes unchanged."""

    def __init__(self, hook: Callable[..., Any], **layouts: Any) -> None:
        super().__init__(**layouts)
        self.hook = hook

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any,
        use_local_output: bool,  # noqa: FBT001
        mod: nn.Module,
        outputs: Any,
        device_mesh: DeviceMesh,
    ) -> Any:
        if not isinstance(outputs, DTensor):
            return outputs
        prepare: Any = ColwiseParallel._prepare_output_fn
        return prepare(output_layouts, use_local_output, mod, outputs, device_mesh)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(self.hook, with_kwargs=True)
        return super()._apply(module, device_mesh)


# Pipeline schedules. The class that runs a schedule from a file is private in torch 2.11 to 2.15.


class NoSelfGreeting:
    """Mixin of a PipelineStage: do not send the first message of a schedule to this rank itself.

    torch 2.11 greets each neighboring stage's rank before the first step, and gloo cannot send to its own rank, where
    V-shaped schedules have neighboring stages. May go when torch skips such pairs.
    """

    group_rank: int

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        greet: Any = super()
        return [one for one in greet._get_init_p2p_neighbors_ops() if one.group_peer != self.group_rank]


def csv_schedule_class() -> Any:
    """Return the schedule class that loads a CSV file."""
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime  # here: takes seconds

    return _PipelineScheduleRuntime


def load_csv_schedule(schedule: Any, path: str) -> None:
    """Load a file of compute actions into an instance of `csv_schedule_class`."""
    schedule._load_csv(path)


def reorder_schedule(schedule: Any, order: Mapping[int, Sequence[Any]]) -> None:
    """Replace the actions of a schedule, and let torch put sends and receives between them again."""
    schedule._prepare_schedule_with_comms(dict(order))


def check_schedule(order: Mapping[int, Sequence[str]], ranks: Sequence[int], microbatches: int) -> None:
    """Let torch check a schedule without running it: also that no two ranks wait for each other forever.

    Args:
        order: Actions of each rank, such as `0F3`.
        ranks: The rank of each stage.
        microbatches: Number of microbatches.

    Raises:
        AssertionError: If the schedule cannot run.
    """
    # Here: importing pipelining takes seconds.
    from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _validate_schedule

    actions: Any = {rank: [_Action.from_str(action) for action in row] for rank, row in order.items()}
    _validate_schedule(actions, len(order), len(ranks), microbatches)
    _add_send_recv(actions, lambda stage: ranks[stage], len(ranks))
