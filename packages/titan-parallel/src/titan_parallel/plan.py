"""The plan: what titan-parallel needs to know about a model, as plain data, and the search for the modules it names.

Written by users or by `plan_from_transformers`; checked by `check`; read by every transform.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from torch import nn
from typing_extensions import ReadOnly

from titan_parallel._torch_compat import WRAPPER_NAMES
from titan_parallel.errors import LayoutError

TensorStyle = Literal[
    "vocab",
    "sequence",
    "gather",
    "colwise",
    "colwise_kv",
    "rowwise",
    "logits",
    "local",
    "replicate",
    "mixture",
    "router",
]

_WRAPPERS = frozenset({*WRAPPER_NAMES, "_entered_module"})  # the last is pipeline.stage_modules' own


class ParallelPlan(TypedDict, total=False):
    """Which modules of a model have which role. Every entry is optional.

    Names are dotted module names; `*` matches any characters within one component (`layers.*` is every layer,
    `layers.*.attn` every layer's attention).

    Attributes:
        blocks: The repeated blocks: the unit of sharding, of activation checkpointing and of compilation.
        before: Modules that run before the first block; each is sharded separately.
        after: Modules that run after the last block; sharded together.
        tensor: Tensor-parallel style of modules. If two patterns match a module, the later one applies. Every parameter
            must be in a module with a style other than `gather` and `mixture`:
            `vocab` an embedding table split over its rows;
            `colwise` a linear split over its outputs;
            `colwise_kv` the same for the projection to keys or values. With fewer key/value heads than ranks, several
            ranks share a head; `heads` states how many there are, and attention must derive the number of local heads
            from the shapes it gets;
            `rowwise` a linear split over its inputs, its output summed over the ranks;
            `sequence` a norm or another module that treats each position separately;
            `gather` a module whose tensor inputs must contain the full sequence;
            `logits` the last linear, split over the vocabulary, whose output stays split for the loss;
            `local` a module between `colwise` and `rowwise` that works on each rank's share separately, with the same
            parameters on every rank, such as a norm over single heads; it must treat all entries of dim 0 alike;
            `replicate` a module, or a single parameter by its name, that every rank holds and computes in full;
            `mixture` a mixture of experts: a module that gets full sequences `[B, S, D]` and returns, in one tensor,
            for each position the sum of the outputs of its experts and of modules beside them. In it `colwise` and
            `rowwise` also split single parameters `[E, outputs, inputs]` or `[E, outputs]` by their names; `replicate`
            is for single parameters only, which multiply split values;
            `router` a module in a mixture that every rank computes in full: its output selects and weights experts.
        tied: Pairs of parameter names (alias, owner) that are one weight.
        divisible: Sizes that the tensor-parallel degree must divide, each under a name for the message.
        attention: Modules that compute attention from full sequences and nothing else; context parallelism replaces
            them. They are called as `core(q, k, v, mask)` with q `[B, H, S, Dh]`, k and v `[B, Hkv, S, Dh]` and return
            `[B, H, S, Dh]`; `mask` is None (causal) or has the attribute `document_ids`, integers `[B, S]` or None:
            then queries attend to keys within their own run of equal ids only, up to their own position. Empty if the
            model calls `context_attention` itself.
        sequence: Inputs of the model that contain the sequence, by the names of its forward's parameters, and their
            dim of the sequence, not negative; `target` stands for the microbatch's target and `output` for the model's
            output. Context parallelism gives each rank its part of them.
        positions: The one of these inputs that contains the positions, integers `[B, S]`. If a caller leaves it out,
            context parallelism fills it in, counting from 0. None for a model that takes no positions.
        heads: Numbers of query heads and of key/value heads.
        experts: Modules that hold the experts of a mixture, each weight with one expert per entry of dim 0. They are
            called as `experts(x, counts)`, x `[N, D]` with the rows of expert 0 first, then those of expert 1, and so
            on, counts integers `[E]`, the number of rows of each; they return `[N, D]`. Under expert parallelism they
            get their rank's experts only, in `counts` as in dim 0 of their weights.
        n_experts: The number of experts of each of these, which the expert-parallel degree must divide.
        save: The model's own operators whose results selective activation checkpointing keeps, by torch's names:
            `namespace.operator`.
    """

    blocks: ReadOnly[Sequence[str]]
    before: ReadOnly[Sequence[str]]
    after: ReadOnly[Sequence[str]]
    tensor: ReadOnly[Mapping[str, str]]
    tied: ReadOnly[Sequence[tuple[str, str]]]
    divisible: ReadOnly[Mapping[str, int]]
    attention: ReadOnly[Sequence[str]]
    sequence: ReadOnly[Mapping[str, int]]
    positions: ReadOnly[str | None]
    heads: ReadOnly[tuple[int, int]]
    experts: ReadOnly[Sequence[str]]
    n_experts: ReadOnly[int]
    save: ReadOnly[Sequence[str]]


@dataclass(frozen=True)
class Roles:
    """Names of the modules of one model in each of the three roles that order it, in the model's order."""

    before: list[str]
    blocks: list[str]
    after: list[str]


@dataclass(frozen=True)
class PlannedModel:
    """A model with its plan and the roles found by it.

    Attributes:
        module: The model.
        plan: Its plan.
        roles: Names of its modules before, in and after the blocks.
    """

    module: nn.Module
    plan: ParallelPlan
    roles: Roles


def clean_name(name: str) -> str:
    """Return the name of a module or parameter without the components that wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def match_names(model: nn.Module, patterns: Iterable[str], *, parameters: bool = False) -> dict[str, list[str]]:
    """Return the names of the modules (and parameters, if `parameters` is set) that each pattern matches.

    Raises:
        LayoutError: If a pattern matches nothing; the message lists every such pattern with the nearest names.
    """
    names = [name for name, _ in model.named_modules() if name]
    if parameters:
        names += [name for name, _ in model.named_parameters()]
    found: dict[str, list[str]] = {}
    wrong: list[str] = []
    for pattern in patterns:
        found[pattern] = [name for name in names if _regex(pattern).fullmatch(name)]
        if not found[pattern]:
            near = difflib.get_close_matches(pattern.replace("*", "0"), names, n=3, cutoff=0.4)
            wrong.append(f"{pattern!r} (nearest: {', '.join(near) or 'none'})")
    if wrong:
        raise LayoutError(f"plan: names modules that {type(model).__name__} does not have: {'; '.join(wrong)}")
    return found


def find_modules(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules of `model`, or of a part of one, that any of `patterns` matches, with or without wrappers."""
    regexes = [_regex(pattern) for pattern in patterns]
    named = ((clean_name(name), module) for name, module in model.named_modules())
    return {name: module for name, module in named if any(regex.fullmatch(name) for regex in regexes)}


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))


def find_roles(model: nn.Module, plan: ParallelPlan) -> Roles:
    """Return the names of the modules of `model` that run before the blocks, are blocks, and run after them.

    Raises:
        LayoutError: If a pattern of the plan matches nothing.
    """
    patterns = {
        "before": plan.get("before", ()),
        "blocks": plan.get("blocks", ()),
        "after": plan.get("after", ()),
    }
    found = match_names(model, [pattern for some in patterns.values() for pattern in some])
    return Roles(**{role: [name for pattern in some for name in found[pattern]] for role, some in patterns.items()})


def style_names(model: nn.Module, plan: ParallelPlan) -> dict[str, str]:
    """Return the tensor-parallel style of each module and parameter that the plan gives one, by name.

    Raises:
        LayoutError: If a pattern of the plan matches nothing.
    """
    styles = plan.get("tensor", {})
    found = match_names(model, styles, parameters=True)
    return {name: style for pattern, style in styles.items() for name in found[pattern]}


def has_sharded_logits(plan: ParallelPlan, tp: int) -> bool:
    """Return whether tensor parallelism of degree `tp` leaves the model's logits split over the vocabulary."""
    return tp > 1 and "logits" in plan.get("tensor", {}).values()
