"""Cutting the model's inputs for context parallelism, and gathering its output.

`parallelize` builds the `SequenceCut` of a model; `ParallelModel` applies it to every microbatch.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titan_parallel._torch_compat import tree_map_only
from titan_parallel.context.collectives import Peers, gather_sequence
from titan_parallel.context.layout import check_length, is_balanced, take_part
from titan_parallel.errors import LayoutError
from titan_parallel.options import ContextKind

TARGET, OUTPUT = "target", "output"  # entries of the plan's `sequence` that are not inputs
_OUTPUT_DIM = 1


class Part(NamedTuple):
    """A rank's part of the arguments of a model and its loss.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        target: Target of the loss.
        length: Number of tokens of each sequence in it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    length: int


@dataclass(frozen=True)
class SequenceCut:
    """How the sequences among the arguments of one model are cut.

    Attributes:
        peers: The ranks that share each sequence.
        kind: Kind of context parallelism, which determines the cut.
        split_over: Ranks over which sequence parallelism splits each part again.
        parameters: Names of the positional parameters of the model's forward, in order.
        dims: The dim of the sequence in each input, by name; see `ParallelPlan.sequence`.
        positions: Name of the input that numbers the positions, if there is one.
    """

    peers: Peers
    kind: ContextKind
    split_over: int
    parameters: tuple[str, ...]
    dims: Mapping[str, int]
    positions: str | None

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], target: Any = None) -> Part:
        """Return this rank's part of full sequences; positions that the caller left out are filled in.

        Args:
            args: Positional arguments of the model.
            kwargs: Keyword arguments of the model.
            target: Target of the loss, any pytree of tensors.

        Raises:
            LayoutError: If no argument holds a sequence, their lengths differ, or a length does not divide.
        """
        if len(args) > len(self.parameters):
            raise LayoutError(
                f"the model's forward has {len(self.parameters)} named positional parameters, but got {len(args)} "
                "positional arguments: it is unknown which of the others hold sequences; pass them by keyword"
            )
        given = dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        full = {name: given[name] for name in _inputs(self.dims) if isinstance(given.get(name), Tensor)}
        length = self._length(full)
        cut = {name: self._part(x, self.dims[name]) for name, x in full.items()}
        if self.positions is not None and self.positions not in full:
            name, x = next(iter(full.items()))
            sequences = x.shape[0] if self.dims[name] == 1 else 1
            cut[self.positions] = self._part(torch.arange(length, device=x.device), 0).expand(sequences, -1)
        placed = zip(self.parameters, args, strict=False)
        new_args = tuple(cut.pop(name, value) for name, value in placed)
        if TARGET in self.dims:
            target = tree_map_only(Tensor, lambda x: self._target(x, length), target)
        return Part(new_args, {**kwargs, **cut}, target, length // self.peers.size)

    def gather(self, output: Any, length: int) -> Any:
        """Return a model's output with its sequences gathered.

        Args:
            output: Any pytree of tensors, on each rank.
            length: Tokens of each sequence on this rank; tensors of another size in the dim of the sequence are
                returned unchanged.
        """
        dim = self.dims.get(OUTPUT, _OUTPUT_DIM)

        def gathered(x: Tensor) -> Tensor:
            if x.ndim <= dim or x.shape[dim] != length:
                return x
            full: Tensor = gather_sequence(x, dim % x.ndim, self.peers.group, self.peers.size, self.kind)
            return full

        return tree_map_only(Tensor, gathered, output)

    def _part(self, x: Tensor, dim: int) -> Tensor:
        balanced = is_balanced(self.kind)
        return take_part(x, dim, self.peers.rank, self.peers.size, balanced=balanced).contiguous()

    def _target(self, x: Tensor, length: int) -> Tensor:
        dim = self.dims[TARGET]
        if x.ndim <= dim or x.shape[dim] != length:
            raise LayoutError(
                f"target: has the shape {list(x.shape)}, but plan['sequence'] states its sequences are in dim {dim}, "
                f"and the model's inputs have {length} tokens; correct the plan or the target"
            )
        return self._part(x, dim)

    def _length(self, full: Mapping[str, Tensor]) -> int:
        lengths = {name: x.shape[self.dims[name]] for name, x in full.items()}
        if not lengths:
            raise LayoutError(
                "context parallelism found no sequence to cut: the model was not given a tensor for any of the inputs "
                f"in plan['sequence'], {sorted(_inputs(self.dims))}"
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
    """Return the `SequenceCut` of a model; arguments are entries of the plan and attributes of `SequenceCut`.

    Raises:
        LayoutError: If the model's forward does not take the inputs that the plan names.
    """
    forward: Callable[..., Any] = model.forward
    parameters = inspect.signature(forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not any(p.kind == p.VAR_KEYWORD for p in parameters):
        wrong = [name for name in [*_inputs(sequence), *([positions] if positions else [])] if name not in names]
        near = {name: difflib.get_close_matches(name, names, n=2, cutoff=0.4) for name in wrong}
        if wrong:
            found = "; ".join(f"{name!r} (nearest: {', '.join(close) or 'none'})" for name, close in near.items())
            raise LayoutError(
                f"plan['sequence'] names inputs that the forward of {type(model).__name__} does not take: {found}"
            )
    by_position = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return SequenceCut(peers, kind, split_over, by_position, dict(sequence), positions)


def _inputs(sequence: Mapping[str, int]) -> Iterator[str]:
    return (name for name in sequence if name not in (TARGET, OUTPUT))
