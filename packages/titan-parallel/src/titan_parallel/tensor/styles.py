"""Tensor and sequence parallelism: from the plan's words to torch's parallel styles.

Between blocks activations stay DTensors, sharded over the sequence (or replicated, without sequence parallelism). A
plain tensor there would hide the collective still in flight from torch.compile, which breaks its backward. A plain
tensor that comes in from outside is taken to be whole, the same on every rank.
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
from torch.utils._pytree import tree_map_only

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
        model: On any device, meta included. Real weights are taken from the first rank of the mesh.
        mesh: The one-dimensional tensor-parallel mesh.
        styles: Name patterns to the words of `ParallelPlan.tensor`.
        sequence_parallel: Whether activations between blocks are split over the sequence.
        kv_heads: Key/value heads, which ranks share if there are fewer than ranks; None if the plan does not tell.

    Raises:
        LayoutError: If a style does not fit what its pattern matches.
    """
    words = _styles(sequence_parallel)
    heads = shared_heads_mesh(mesh, kv_heads) if "colwise_kv" in styles.values() and kv_heads else None
    chosen = style_names(model, {"tensor": styles})
    for mixture in [name for name, style in chosen.items() if style == "mixture"]:
        inside = {name: style for name, style in chosen.items() if name.startswith(f"{mixture}.")}
        styles = {name.removeprefix(f"{mixture}."): style for name, style in inside.items()}
        split_mixture(mixture, model.get_submodule(mixture), mesh, styles, _between(sequence_parallel))
        chosen = {name: style for name, style in chosen.items() if name != mixture and name not in inside}
    parameters = dict(model.named_parameters())
    _check_kinds(model, {name: style for name, style in chosen.items() if style != "replicate"}, parameters)
    _check_widths(model, chosen, mesh.size())
    # What copies whole modules comes last: it leaves alone the parameters that another word has split.
    for name in sorted(chosen, key=lambda name: isinstance(words[chosen[name]], _Copied | _Local)):
        if name in parameters:
            _replicate_parameter(model, name, mesh)
        elif chosen[name] == "colwise_kv" and heads is not None:
            share_heads(model, name, mesh, heads)
        else:
            parallelize_module(model.get_submodule(name), mesh, words[chosen[name]])


def check_covered(model: nn.Module) -> None:
    """Check that tensor parallelism has reached every parameter of `model`.

    torch refuses to mix a plain parameter with split activations, in words that name neither. Worse, where a block's
    inside is plain on each rank (the heads of attention), it takes the parameter and each rank gets another gradient.

    Raises:
        LayoutError: With the names that no pattern covers.
    """
    plain = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if plain:
        more = f" and {len(plain) - _SHOWN} more" if len(plain) > _SHOWN else ""
        raise LayoutError(
            f"tp is more than 1, but no pattern under 'tensor' of the plan covers {', '.join(plain[:_SHOWN])}{more}; "
            "if every rank is to compute with all of it, say 'sequence' (each position by itself) or 'replicate'"
        )


def settle_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Lay each gradient out as its parameter.

    Parameters that tensor-parallel ranks share gather a part of their gradient on each: the parts are summed here, once
    for all microbatches, so that nobody after this meets a gradient that is laid out otherwise than its parameter.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


def to_full(x: Tensor) -> Tensor:
    """Return `x` as a plain tensor, gathered from all ranks if it is a DTensor."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole(output: Any) -> Any:
    """Return a model's output, a tensor or any container of tensors that torch knows, with whole tensors in it."""
    return tree_map_only(DTensor, to_full, output)


def _check_kinds(model: nn.Module, styles: Mapping[str, str], parameters: Mapping[str, nn.Parameter]) -> None:
    wrong = [f"{name!r} is a parameter, for which there is only 'replicate'" for name in styles if name in parameters]
    modules = {name: model.get_submodule(name) for name in styles if name not in parameters}
    wrong += [f"{name!r} is under no 'mixture', as a 'router' has to be" for name in styles if styles[name] == "router"]
    wrong += [
        f"{name!r} is a {type(module).__name__}, but {styles[name]!r} splits nn.Linear and nn.Embedding only"
        for name, module in modules.items()
        if styles[name] not in ("sequence", "gather", "local", "router")
        and not isinstance(module, nn.Linear | nn.Embedding)
    ]
    if wrong:
        raise LayoutError(f"the plan's styles do not fit {type(model).__name__}: {'; '.join(wrong)}")


def _check_widths(model: nn.Module, styles: Mapping[str, str], tp: int) -> None:
    dims = {"colwise": 0, "rowwise": 1}  # of a weight, that are split
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


def _styles(sequence_parallel: bool) -> dict[str, ParallelStyle]:
    between = _between(sequence_parallel)
    return {
        "vocab": RowwiseParallel(input_layouts=Replicate(), output_layouts=between, use_local_output=False),
        "sequence": _Copied(between),
        "replicate": _Copied(Replicate()),
        "gather": _WholeSequence(),
        "local": _Local(),
        "colwise": ColwiseParallel(),
        "colwise_kv": ColwiseParallel(),
        "rowwise": RowwiseParallel(output_layouts=between, use_local_output=False),
        "logits": _Logits(output_layouts=Shard(-1), use_local_output=False),
    }


def _between(sequence_parallel: bool) -> Placement:
    return Shard(_SEQUENCE_DIM) if sequence_parallel else Replicate()


class _Copied(ParallelStyle):
    """Runs a module on activations as they lie between blocks, with the same parameters on every rank.

    torch's SequenceParallel is this for a sharded sequence only.
    """

    def __init__(self, layout: Placement) -> None:
        super().__init__()
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(_lay_out_inputs, device_mesh, self.layout), with_kwargs=True)
        return distribute_module(module, device_mesh)


def _lay_out_inputs(
    mesh: DeviceMesh, layout: Placement, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make plain tensors DTensors: the first argument in `layout`, others (a scale, a mask) whole."""
    laid = [_laid_out(x, mesh, Replicate() if i else layout) for i, x in enumerate([*args, *kwargs.values()])]
    return tuple(laid[: len(args)]), dict(zip(kwargs, laid[len(args) :], strict=True))


def _laid_out(x: object, mesh: DeviceMesh, layout: Placement) -> object:
    if not isinstance(x, Tensor) or isinstance(x, DTensor):
        return x
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[layout])


class _Local(ParallelStyle):
    """Runs a module on this rank's own plain tensor, such as its heads, with the same parameters on every rank.

    To torch the ranks hold parts of one batch, whichever dim it is that they really share: then the gradient of a
    parameter is known to be a part on each rank.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(_batch_of_ranks, device_mesh), with_kwargs=True)
        module.register_forward_hook(_own_output)
        return distribute_module(module, device_mesh)


def _batch_of_ranks(
    mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make plain tensors DTensors: the first argument a part of a batch, others (a scale) whole."""
    joined = [
        DTensor.from_local(x, mesh, [Replicate() if i else Shard(0)], run_check=False)
        if isinstance(x, Tensor) and not isinstance(x, DTensor)
        else x
        for i, x in enumerate([*args, *kwargs.values()])
    ]
    return tuple(joined[: len(args)]), dict(zip(kwargs, joined[len(args) :], strict=True))


def _own_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return tree_map_only(DTensor, lambda x: x.to_local(), output)


class _WholeSequence(ParallelStyle):
    """Gathers once what a module's children would otherwise each gather for themselves."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(_gather_inputs, with_kwargs=True)
        return module


class _Logits(ColwiseParallel):
    """A linear split over its outputs, which stay split; its input is gathered as by `_WholeSequence`.

    A head may return something else than logits, say a loss that it has taken of them; that passes as it is.
    """

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> Any:
        if not isinstance(outputs, DTensor):
            return outputs
        prepare: Any = ColwiseParallel._prepare_output_fn
        return prepare(output_layouts, use_local_output, mod, outputs, device_mesh)

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
