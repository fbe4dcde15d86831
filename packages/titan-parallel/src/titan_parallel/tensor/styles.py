"""Tensor and sequence parallelism: from the plan's styles to torch's parallel styles.

Between blocks activations stay DTensors, sharded over the sequence (or replicated, without sequence parallelism). A
regular tensor there would hide a collective that is still in flight from torch.compile, which breaks its backward. A
regular tensor that comes from outside the blocks is taken to be a full tensor, equal on every rank.

`parallelize` calls `apply_tensor_parallel` first of all transforms, then `check_covered`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from titan_parallel._torch_compat import ColwiseAnyOutput, Style, tree_map_only
from titan_parallel.errors import LayoutError
from titan_parallel.plan import style_names
from titan_parallel.tensor.kv_heads import share_heads, shared_heads_mesh
from titan_parallel.tensor.moe import split_mixture

_SEQUENCE_DIM = 1  # activations are [B, S, ...]
_SHOWN = 8  # names in a message


def apply_tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, styles: Mapping[str, str], *, sequence_parallel: bool, kv_heads: int | None
) -> None:
    """Split the modules of `model` in place.

    Args:
        model: The model, on any device, meta included. Values are taken from the first rank of the mesh.
        mesh: The one-dimensional tensor-parallel mesh.
        styles: Name patterns to styles of `ParallelPlan.tensor`.
        sequence_parallel: Whether activations between blocks are split over the sequence.
        kv_heads: Number of key/value heads, which ranks share if there are fewer than ranks; None if not in the plan.

    Raises:
        LayoutError: If a style does not fit the modules that its pattern matches.
    """
    between: Placement = Shard(_SEQUENCE_DIM) if sequence_parallel else Replicate()
    torch_styles = _styles(between)
    heads = shared_heads_mesh(mesh, kv_heads) if "colwise_kv" in styles.values() and kv_heads else None
    chosen = style_names(model, {"tensor": styles})
    for mixture in [name for name, style in chosen.items() if style == "mixture"]:
        inside = {name: style for name, style in chosen.items() if name.startswith(f"{mixture}.")}
        styles = {name.removeprefix(f"{mixture}."): style for name, style in inside.items()}
        split_mixture(mixture, model.get_submodule(mixture), mesh, styles, between)
        chosen = {name: style for name, style in chosen.items() if name != mixture and name not in inside}
    parameters = dict(model.named_parameters())
    _check_kinds(model, {name: style for name, style in chosen.items() if style != "replicate"}, parameters)
    _check_widths(model, chosen, mesh.size())
    # Styles that replicate all of a module come last: they skip parameters that another style has split.
    for name in sorted(chosen, key=lambda name: isinstance(torch_styles[chosen[name]], _Copied | _Local)):
        if name in parameters:
            _replicate_parameter(model, name, mesh)
        elif chosen[name] == "colwise_kv" and heads is not None:
            share_heads(model, name, mesh, heads)
        else:
            parallelize_module(model.get_submodule(name), mesh, torch_styles[chosen[name]])


def check_covered(model: nn.Module) -> None:
    """Check that tensor parallelism has reached every parameter of `model`.

    torch refuses to mix a regular parameter with DTensors, in an error that names neither. Worse, where activations are
    regular tensors inside a block (the heads of attention), it accepts the parameter and each rank gets a different
    gradient.

    Raises:
        LayoutError: If parameters are covered by no pattern; the message names them.
    """
    uncovered = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if uncovered:
        more = f" and {len(uncovered) - _SHOWN} more" if len(uncovered) > _SHOWN else ""
        raise LayoutError(
            f"plan['tensor']: with tp above 1 every parameter needs a style, but no pattern covers "
            f"{', '.join(uncovered[:_SHOWN])}{more}; if every rank should compute with all of it, use 'sequence' (a "
            "module that treats each position separately) or 'replicate'"
        )


def settle_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give each gradient the placements of its parameter.

    A parameter that tensor-parallel ranks share accumulates a part of its gradient on each of them. The parts are
    summed here, once for all microbatches, so that later code can rely on equal placements.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def to_full(x: Tensor) -> Tensor:
    """Return `x` as a regular tensor, gathered from all ranks if it is a DTensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def full_output(output: Any) -> Any:
    """Return a model's output, any pytree, with its DTensors gathered to full tensors."""
    return tree_map_only(DTensor, to_full, output)


def _check_kinds(model: nn.Module, styles: Mapping[str, str], parameters: Mapping[str, nn.Parameter]) -> None:
    wrong = [
        f"{name!r} is a parameter, for which the only style is 'replicate'" for name in styles if name in parameters
    ]
    modules = {name: model.get_submodule(name) for name in styles if name not in parameters}
    wrong += [f"{name!r} is a 'router', but not inside a 'mixture'" for name in styles if styles[name] == "router"]
    wrong += [
        f"{name!r} is a {type(module).__name__}, but {styles[name]!r} splits nn.Linear and nn.Embedding only"
        for name, module in modules.items()
        if styles[name] not in ("sequence", "gather", "local", "router")
        and not isinstance(module, nn.Linear | nn.Embedding)
    ]
    if wrong:
        raise LayoutError(f"plan['tensor'] does not fit {type(model).__name__}: {'; '.join(wrong)}")


def _check_widths(model: nn.Module, styles: Mapping[str, str], tp: int) -> None:
    dims = {"colwise": 0, "rowwise": 1}  # the dim of a weight that is split
    widths = {
        f"the {('outputs', 'inputs')[dims[style]]} of {name!r}": model.get_parameter(f"{name}.weight").shape[
            dims[style]
        ]
        for name, style in styles.items()
        if style in dims
    }
    wrong = [f"{what}, {width}" for what, width in widths.items() if width % tp]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        common = math.gcd(*widths.values())
        fits = [degree for degree in range(1, common + 1) if common % degree == 0]
        raise LayoutError(f"tp {tp} does not divide {'; '.join(wrong[:_SHOWN])}{more}; these degrees would: {fits}")


def _replicate_parameter(model: nn.Module, name: str, mesh: DeviceMesh) -> None:
    module, _, key = name.rpartition(".")
    parameter = model.get_parameter(name)
    copied = nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()]), requires_grad=parameter.requires_grad)
    model.get_submodule(module).register_parameter(key, copied)


def _styles(between: Placement) -> dict[str, ParallelStyle]:
    """Return torch's style for each style of the plan; `between` is the placement of activations between blocks."""
    return {
        "vocab": RowwiseParallel(input_layouts=Replicate(), output_layouts=between, use_local_output=False),
        "sequence": _Copied(between),
        "replicate": _Copied(Replicate()),
        "gather": _Gather(),
        "local": _Local(),
        "colwise": ColwiseParallel(),
        "colwise_kv": ColwiseParallel(),
        "rowwise": RowwiseParallel(output_layouts=between, use_local_output=False),
        # A head may return something else than logits, such as a loss that it computed from them.
        "logits": ColwiseAnyOutput(_gather_inputs, output_layouts=Shard(-1), use_local_output=False),
    }


class _Copied(Style):
    """Run a module on activations as they are between blocks, with the same parameters on every rank.

    torch's SequenceParallel does this for a sharded sequence only.
    """

    def __init__(self, layout: Placement) -> None:
        super().__init__()
        self.layout = layout

    def apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(_lay_out_inputs, mesh, self.layout), with_kwargs=True)
        return distribute_module(module, mesh)


def _lay_out_inputs(
    mesh: DeviceMesh, layout: Placement, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make regular tensors DTensors: the first argument in `layout`, others (a scale, a mask) replicated."""
    laid = [_laid_out(x, mesh, Replicate() if i else layout) for i, x in enumerate([*args, *kwargs.values()])]
    return tuple(laid[: len(args)]), dict(zip(kwargs, laid[len(args) :], strict=True))


def _laid_out(x: object, mesh: DeviceMesh, layout: Placement) -> object:
    if not isinstance(x, Tensor) or isinstance(x, DTensor):
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[layout])


class _Local(Style):
    """Run a module on this rank's regular tensor, such as its heads, with the same parameters on every rank.

    The tensor is declared to torch as a part of a batch, whichever dim is really split: then each rank's gradient of a
    parameter is treated as a part of a sum.
    """

    def apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(_batch_of_ranks, mesh), with_kwargs=True)
        module.register_forward_hook(_own_output)
        return distribute_module(module, mesh)


def _batch_of_ranks(
    mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make regular tensors DTensors: the first argument a part of a batch, others (a scale) replicated."""
    joined = [
        DTensor.from_local(x, mesh, [Replicate() if i else Shard(0)], run_check=False)
        if isinstance(x, Tensor) and not isinstance(x, DTensor)
        else x
        for i, x in enumerate([*args, *kwargs.values()])
    ]
    return tuple(joined[: len(args)]), dict(zip(kwargs, joined[len(args) :], strict=True))


def _own_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tree_map_only(DTensor, lambda x: x.to_local(), output)


class _Gather(Style):
    """Gather a module's inputs once; otherwise each of its children would gather them."""

    def apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(_gather_inputs, with_kwargs=True)
        return module


def _gather_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(_gathered(x) for x in args), {key: _gathered(x) for key, x in kwargs.items()}


def _gathered(x: object) -> object:
    if not isinstance(x, DTensor):
        return x
    if not x.placements[0].is_replicate():
        return x.redistribute(placements=[Replicate()])
    # Replicated already, but the children's gradients are partial sums. Passing through a regular tensor sums them
    # here, once; left partial they would reach the embedding, whose backward does not support them.
    return DTensor.from_local(x.to_local(), x.device_mesh, x.placements, run_check=False)
