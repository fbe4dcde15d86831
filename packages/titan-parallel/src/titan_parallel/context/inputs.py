"""What of a microbatch a rank of context parallelism gets, and its output made whole again."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from titan_parallel.context.collectives import Peers, gather_sequence
from titan_parallel.context.layout import check_length, is_balanced, take_part
from titan_parallel.errors import LayoutError
from titan_parallel.options import ContextKind

TARGET, OUTPUT = "target", "output"  # entries of the plan's `sequence` that are no inputs
_OUTPUT_DIM = 1


class Part(NamedTuple):
    """A rank's part of what a model and its loss get.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        target: What the loss compares with.
        length: Tokens of each sequence that are in it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    length: int


@dataclass(frozen=True)
class SequenceCut:
    """Cuts the sequences among the arguments of one model.

    Attributes:
        peers: The ranks that share each sequence.
        kind: How they compute attention.
        split_over: Ranks over which each part is split again, by sequence parallelism.
        parameters: Names of what the model's forward takes by position, in order.
        dims: In which dim inputs, by name, hold the sequence; see `ParallelPlan.sequence`.
        positions: Name of the input that numbers the positions, if there is one.
    """

    peers: Peers
    kind: ContextKind
    split_over: int
    parameters: tuple[str, ...]
    dims: Mapping[str, int]
    positions: str | None

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any = None) -> Part:
        """Return this rank's part of whole sequences; positions that the caller left out are filled in.

        Args:
            args: Positional arguments of the model.
            kwargs: Keyword arguments of the model.
            target: What the loss compares with; any container of tensors that torch knows.

        Raises:
            LayoutError: If no argument holds a sequence, their lengths differ, or a length cannot be cut.
        """
        if len(args) > len(self.parameters):
            raise LayoutError(
                f"the model's forward names {len(self.parameters)} positional parameters, but {len(args)} are given: "
                "which of the others hold sequences cannot be told; pass them by keyword"
            )
        given = dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        whole = {name: given[name] for name in _inputs(self.dims) if isinstance(given.get(name), Tensor)}
        length = self._length(whole)
        cut = {name: self._part(x, self.dims[name]) for name, x in whole.items()}
        if self.positions is not None and self.positions not in whole:
            name, x = next(iter(whole.items()))
            rows = x.shape[0] if self.dims[name] == 1 else 1
            cut[self.positions] = self._part(torch.arange(length, device=x.device), 0).expand(rows, -1)
        placed = zip(self.parameters, args, strict=False)
        new_args = tuple(cut.pop(name, value) for name, value in placed)
        if TARGET in self.dims:
            target = tree_map_only(Tensor, lambda x: self._target(x, length), target)
        return Part(new_args, {**kwargs, **cut}, target, length // self.peers.size)

    def gather(self, output: Any, length: int) -> Any:
        """Return a model's output with whole sequences in it.

        Args:
            output: A tensor or any container of tensors that torch knows, on each rank.
            length: Tokens of each sequence on this rank; tensors of another size in the output's dim of the sequence
                stay as they are.
        """
        dim = self.dims.get(OUTPUT, _OUTPUT_DIM)

        def gathered(x: Tensor) -> Tensor:
            if x.ndim <= dim or x.shape[dim] != length:
                return x
            whole: Tensor = gather_sequence(x, dim % x.ndim, self.peers.group, self.peers.size, is_balanced(self.kind))
            return whole

        return tree_map_only(Tensor, gathered, output)

    def _part(self, x: Tensor, dim: int) -> Tensor:
        balanced = is_balanced(self.kind)
        return take_part(x, dim, self.peers.rank, self.peers.size, balanced=balanced).contiguous()

    def _target(self, x: Tensor, length: int) -> Tensor:
        dim = self.dims[TARGET]
        if x.ndim <= dim or x.shape[dim] != length:
            raise LayoutError(
                f"the target is {list(x.shape)}, but the plan says that it holds sequences in dim {dim}, and those of "
                f"the model's inputs have {length} tokens"
            )
        return self._part(x, dim)

    def _length(self, whole: Mapping[str, Tensor]) -> int:
        lengths = {name: x.shape[self.dims[name]] for name, x in whole.items()}
        if not lengths:
            raise LayoutError(
                f"context parallelism finds no sequence to cut: none of {sorted(_inputs(self.dims))}, which the plan "
                "names under 'sequence', is given to the model as a tensor"
            )
        if len(set(lengths.values())) > 1:
            raise LayoutError(f"the model's inputs hold sequences of different lengths: {lengths}")
        length = next(iter(lengths.values()))
        check_length(length, self.peers.size, self.kind, self.split_over)
        return length


def sequence_cut(
    model: nn.Module,
    sequence: Mapping[str, int],
    positions: str | None,
    *,
    peers: Peers,
    kind: ContextKind,
    split_over: int,
) -> SequenceCut:
    """Return what cuts the inputs of `model`; arguments are entries of the plan and attributes of `SequenceCut`.

    Raises:
        LayoutError: If its forward takes no such inputs.
    """
    forward: Callable[..., Any] = model.forward
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        wrong = [name for name in [*_inputs(sequence), *([positions] if positions else [])] if name not in names]
        near = {name: difflib.get_close_matches(name, names, n=2, cutoff=0.4) for name in wrong}
        if wrong:
            said = "; ".join(f"{name!r} (nearest: {', '.join(close) or 'none'})" for name, close in near.items())
            raise LayoutError(
                f"the plan names inputs under 'sequence' that the forward of {type(model).__name__} does not take: "
                f"{said}"
            )
    by_position = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return SequenceCut(peers, kind, split_over, by_position, dict(sequence), positions)


def _inputs(sequence: Mapping[str, int]) -> Iterator[str]:
    return (name for name in sequence if name not in (TARGET, OUTPUT))
