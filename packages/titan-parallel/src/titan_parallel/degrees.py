"""The degrees of parallelism. Like `options`, this module does without torch: a command line can read its fields."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from titan_parallel.errors import LayoutError

MESH_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "ep", "tp")

_NEAREST = 3  # layouts in a message


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """The layout: how many ways each kind of parallelism splits the work. The product is the world size.

    Every field is described in its metadata, `dataclasses.fields(Degrees)`, and in the README.

    Raises:
        LayoutError: If a degree is below 1 (`dp_shard` may be -1).
    """

    dp_replicate: int = field(
        default=1, metadata={"help": "Copies of the (sharded) model, each on its own part of the batch."}
    )
    dp_shard: int = field(
        default=-1,
        metadata={
            "help": "Ranks over which FSDP2 shards each copy of the model, each on its own part of the batch; -1 uses "
            "all remaining ranks."
        },
    )
    ep: int = field(
        default=1,
        metadata={
            "help": "Ranks that hold different experts of a mixture (expert parallelism), each on its own part of the "
            "batch. Other parameters are sharded over `dp_shard * ep * cp` ranks."
        },
    )
    cp: int = field(
        default=1,
        metadata={"help": "Ranks that share each sequence (context parallelism), on the same sequences of the batch."},
    )
    tp: int = field(
        default=1,
        metadata={"help": "Ranks that share every matrix product (tensor parallelism), on the same part of the batch."},
    )
    pp: int = field(
        default=1,
        metadata={
            "help": "Ranks that share the blocks, in stages (pipeline parallelism), on the same part of the batch."
        },
    )

    def __post_init__(self) -> None:
        """Check the values."""
        wrong = [f"{name} is {value}" for name, value in self.items() if value < 1 and (name, value) != _REST]
        if wrong:
            raise LayoutError(f"degrees must be at least 1 (dp_shard may be -1): {', '.join(wrong)}")

    def resolve(self, world_size: int) -> Degrees:
        """Return the degrees with a `dp_shard` of -1 filled in.

        Args:
            world_size: Number of ranks.

        Raises:
            LayoutError: If the degrees cannot multiply to `world_size`; the message lists some that do.
        """
        fixed = math.prod(value for name, value in self.items() if name != "dp_shard")
        if world_size % fixed or self.dp_shard not in (-1, world_size // fixed):
            raise LayoutError(self._misfit(world_size))
        return replace(self, dp_shard=world_size // fixed)

    @property
    def dp_world_size(self) -> int:
        """Number of data-parallel ranks, those that read different parts of the batch; needs `dp_shard` resolved."""
        assert self.dp_shard > 0
        return self.dp_replicate * self.dp_shard * self.ep

    def items(self) -> list[tuple[str, int]]:
        """Return pairs of mesh dim and degree, in the order of `MESH_DIMS`."""
        return [(name, getattr(self, name)) for name in MESH_DIMS]

    def _misfit(self, world_size: int) -> str:
        given = [(name, value) for name, value in self.items() if (name, value) != _REST]
        shown = " x ".join(f"{name} {value}" for name, value in given if value > 1 or name == "dp_shard") or "tp 1"
        product = math.prod(value for _, value in given)
        problem = "does not divide" if self.dp_shard == -1 else "is not"
        near = "; or ".join(self._near(world_size))
        return f"{shown} = {product}, which {problem} the number of processes, {world_size}; this would work: {near}"

    def _near(self, world_size: int) -> list[str]:
        """Return the layouts for `world_size` ranks that change the fewest degrees by the least."""
        wanted = {name: value for name, value in self.items() if name != "dp_shard"}
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        names = [name for name, value in wanted.items() if value > 1] or ["tp"]
        found = sorted(
            (_distance(wanted, dict(zip(names, chosen, strict=True))), chosen)
            for chosen in _products(world_size, divisors, [wanted[name] for name in names])
        )
        layouts = []
        for _, chosen in found[:_NEAREST]:
            parts = [f"{name} {degree}" for name, degree in zip(names, chosen, strict=True)]
            layouts.append(", ".join([*parts, f"dp_shard {world_size // math.prod(chosen)}"]))
        return layouts


_REST = ("dp_shard", -1)


def _products(world_size: int, divisors: list[int], wanted: list[int]) -> Iterator[tuple[int, ...]]:
    """Yield tuples of degrees whose product divides `world_size`, each degree at most twice the wanted one."""
    if not wanted:
        yield ()
        return
    for first in divisors:
        if first <= 2 * wanted[0] and world_size % first == 0:
            rest = world_size // first
            for others in _products(rest, [d for d in divisors if rest % d == 0], wanted[1:]):
                yield (first, *others)


def _distance(wanted: dict[str, int], chosen: dict[str, int]) -> tuple[int, float]:
    ratios = [abs(math.log2(chosen[name] / wanted[name])) for name in chosen]
    return sum(ratio > 0 for ratio in ratios), sum(ratios)
