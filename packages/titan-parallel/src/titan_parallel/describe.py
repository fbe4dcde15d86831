"""The table of `ParallelModel.describe`: how each parameter is split, and its size on this rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard

from titan_parallel.degrees import MESH_DIMS
from titan_parallel.options import ParallelOptions, reshard_blocks

_HEADER = ("parameter", "style", "placement", "shape", "on this rank", "dtype", "bytes on this rank")
_GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a model was parallelized, as far as its parameters do not show it.

    Attributes:
        options: The options.
        blocks: Names of the blocks of all stages.
        styles: Names of modules and parameters to their tensor-parallel style; empty without tensor parallelism.
        float8: Names of the linears that multiply in float8.
    """

    options: ParallelOptions
    blocks: Sequence[str]
    styles: Mapping[str, str]
    float8: Sequence[str]


class _Row(NamedTuple):
    """The cells of a line, which stands for equal parameters; `name` is relative to the block, if there is one."""

    name: str
    style: str
    placement: str
    shape: str
    local: str
    dtype: str


def describe(named_parameters: Iterable[tuple[str, nn.Parameter]], mesh: DeviceMesh, layout: Layout) -> str:
    """Return a table with one line per parameter of this rank, equal blocks combined, and totals.

    Args:
        named_parameters: Names in the original model and parameters, each once; they may be on meta.
        mesh: From `build_mesh`.
        layout: How the model was parallelized.
    """
    rows: dict[_Row, list[str]] = {}
    sizes: dict[_Row, int] = {}
    total = trained = 0
    for name, parameter in named_parameters:
        block = next((block for block in layout.blocks if name.startswith(f"{block}.")), "")
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        row = _Row(
            name.removeprefix(f"{block}.") if block else name,
            _style(name, layout),
            _placement(parameter),
            _shape(parameter),
            _shape(local),
            str(parameter.dtype).removeprefix("torch."),
        )
        size = local.numel() * local.element_size()
        rows.setdefault(row, []).append(block)
        sizes[row] = sizes.get(row, 0) + size
        total += size
        trained += size if parameter.requires_grad else 0
    lines = [
        (f"{_blocks(blocks)}.{row.name}" if blocks[0] else row.name, *row[1:], f"{sizes[row]:,}")
        for row, blocks in rows.items()
    ]
    totals = {
        "parameters": total,
        "gradients": trained,
        "AdamW state, 2 values of the parameter's dtype each": 2 * trained,
    }
    sums = [f"{what}: {size:,} bytes ({size / _GIB:.2f} GiB) on this rank" for what, size in totals.items()]
    return "\n".join([*_notes(mesh, layout), "", *_table([_HEADER, *lines]), "", *sums])


def _style(name: str, layout: Layout) -> str:
    """Return the plan's style of a parameter: its own, or that of the nearest module above it."""
    parts = name.split(".")
    above = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    style = next((layout.styles[one] for one in above if layout.styles.get(one, "gather") != "gather"), "-")
    return f"{style}, float8" if name.removesuffix(".weight") in layout.float8 else style


def _placement(parameter: nn.Parameter) -> str:
    if not isinstance(parameter, DTensor):
        return "unsharded"
    names = parameter.device_mesh.mesh_dim_names or ()
    kinds = [f"{name} {_kind(placement)}" for name, placement in zip(names, parameter.placements, strict=True)]
    return ", ".join(kinds)


def _kind(placement: Placement) -> str:
    # FSDP2 shards within tensor-parallel shards are a separate placement, which is a `Shard` in some torch versions
    # only; it always has a `dim`.
    dim = getattr(placement, "dim", None)
    return f"dim {dim}" if isinstance(placement, Shard) or dim is not None else "replicated"


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape)) or "scalar"


def _blocks(names: Sequence[str]) -> str:
    """Return one name for several that end in numbers, such as `layers.0-3,5`; other names are listed."""
    parents, keys = zip(*[name.rpartition(".")[::2] for name in names], strict=True)
    if len(names) == 1 or len(set(parents)) > 1 or not all(key.isdecimal() for key in keys):
        return ",".join(names)
    runs: list[list[int]] = []
    for number in sorted(map(int, keys)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    ranges = ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
    return f"{parents[0]}.{ranges}" if parents[0] else ranges


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    padded = [
        "  ".join(
            cell.rjust(width) if i == len(widths) - 1 else cell.ljust(width) for i, (cell, width) in enumerate(line)
        )
        for line in (zip(row, widths, strict=True) for row in rows)
    ]
    return [padded[0], "-" * len(padded[0]), *padded[1:]]


def _notes(mesh: DeviceMesh, layout: Layout) -> list[str]:
    options = layout.options
    degrees = [f"{name} {mesh[name].size()}" for name in MESH_DIMS if mesh[name].size() > 1]
    notes = [f"{mesh.size()} ranks: {', '.join(degrees) or 'no parallelism'}"]
    if options.param_dtype is not None:
        notes.append(f"forward and backward in {options.param_dtype}, gradients summed in {options.reduce_dtype}")
    if mesh["dp_shard"].size() * mesh["cp"].size() * mesh["ep"].size() > 1:
        between = {True: "are sharded again", False: "stay gathered"}
        kept = reshard_blocks(options, mesh["pp"].size())
        words = between[kept] if isinstance(kept, bool) else f"are sharded over {kept} ranks"
        notes.append(f"between a block's forward and backward its weights {words}")
    if options.cpu_offload:
        notes.append("parameters, gradients and optimizer state in host memory")
    if options.activation_checkpointing != "none":
        notes.append(f"activation checkpointing: {_checkpointing(options)} of {len(layout.blocks)} blocks")
    if options.compile_blocks:
        notes.append(f"compiled: each of {len(layout.blocks)} blocks, by {options.compile_backend}")
    if options.float8 is not None:
        how = ", emulated" if options.float8.emulate else ""
        notes.append(f"float8: {len(layout.float8)} linears, {options.float8.recipe}{how}")
    return notes


def _checkpointing(options: ParallelOptions) -> str:
    if options.memory_budget is not None:
        return f"chosen by the compiler, within {options.memory_budget:.0%} of the activations,"
    every = f", one of every {options.checkpoint_every}" if options.checkpoint_every > 1 else ""
    return options.activation_checkpointing + every
