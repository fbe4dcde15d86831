"""The plan: what titan-parallel needs to know of a model, as plain data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from torch import nn
from typing_extensions import ReadOnly

from titan_parallel.context.layout import check_heads, check_length
from titan_parallel.errors import LayoutError
from titan_parallel.mesh import Degrees
from titan_parallel.options import ContextKind, ParallelOptions, check_options

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

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "_entered_module")


class ParallelPlan(TypedDict, total=False):
    """Which modules play which role. Every entry may be left out.

    Names are dotted module names; `*` stands for any run of characters within one part (`layers.*` is every layer,
    `layers.*.attn` every layer's attention).

    Attributes:
        blocks: The repeated blocks: the unit of sharding, of activation checkpointing and of compilation.
        before: Modules that run before the first block; each is sharded by itself.
        after: Modules that run after the last block; sharded together.
        tensor: Tensor-parallel style of modules. Of two patterns that match one module the later one holds. Every
            parameter has to be under a module with a style other than `gather` and `mixture`:
            `vocab` an embedding table split over its rows;
            `colwise` a linear split over its outputs;
            `colwise_kv` the same for the projection to keys or values, whose heads several ranks share where there are
            fewer of them than ranks; `heads` says how many there are, and attention sees from the shapes it gets how
            many a rank has;
            `rowwise` a linear split over its inputs, its output summed over the ranks;
            `sequence` a norm or the like that works on each position by itself;
            `gather` a module whose tensor inputs must hold the whole sequence;
            `logits` the last linear, split over the vocabulary, whose output stays split for the loss;
            `local` a module between `colwise` and `rowwise` that works on each rank's share by itself, with the same
            parameters on every rank, as a norm over single heads; it must treat each entry of dim 0 alike;
            `replicate` a module, or a single parameter by its name, that every rank holds and computes in whole;
            `mixture` a mixture of experts: a module that is given whole sequences `[B, S, D]` and returns, in one
            tensor, for each position the sum of what its experts, and modules beside them, make of it. In it
            `colwise` and `rowwise` also split single parameters `[E, outputs, inputs]` or `[E, outputs]` by their
            names; `replicate` is for single parameters only, which multiply what is split;
            `router` a module in a mixture that every rank computes in whole: what it puts out chooses and weighs.
        tied: Pairs of parameter names (alias, owner) that are one weight.
        divisible: Sizes that the tensor-parallel degree has to divide, each under a name for the message.
        attention: Modules that compute attention from whole sequences and nothing else; context parallelism puts
            another in their place. They are called as `core(q, k, v, mask)` with q `[B, H, S, Dh]`, k and v
            `[B, Hkv, S, Dh]` and return `[B, H, S, Dh]`; `mask` is None (causal) or has `document_ids`, integers
            `[B, S]` or None: then queries see the keys of their own run of equal ids only, up to themselves. Empty if
            the model calls `context_attention` by itself.
        sequence: Inputs of the model that hold the sequence, by the names of its forward's parameters, and the dim in
            which they do, counted from the front; `target` stands for the microbatch's target and `output` for what the
            model returns. Context parallelism gives each rank its part of them.
        positions: The one of these inputs that numbers the positions, integers `[B, S]`. Where a caller leaves it out,
            context parallelism fills it in, counting from 0. None for a model to which no position is told.
        heads: Numbers of query heads and of key/value heads.
        experts: Modules that hold the experts of a mixture, each weight with one expert for each entry of dim 0. They
            are called as `experts(x, counts)`, x `[N, D]` with the rows of expert 0 first, then those of expert 1,
            and so on, counts integers `[E]`, the rows of each; they return `[N, D]`. Under expert parallelism they
            see their rank's experts only, in `counts` as in the dim 0 of their weights.
        n_experts: The number of experts of each of these, which the expert-parallel degree has to divide.
        save: Operators of the model's own whose results selective activation checkpointing keeps, named as torch does:
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


def clean_name(name: str) -> str:
    """Return a module's or parameter's name without what wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def match_names(model: nn.Module, patterns: Iterable[str], *, parameters: bool = False) -> dict[str, list[str]]:
    """Return for each pattern the names of the modules (and `parameters`, if wanted) that it matches.

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
        raise LayoutError(f"the plan names modules that {type(model).__name__} does not have: {'; '.join(wrong)}")
    return found


def find_modules(model: nn.Module, patterns: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules of `model`, or of a part of one, that any of `patterns` matches, whatever wraps them."""
    regexes = [_regex(pattern) for pattern in patterns]
    named = ((clean_name(name), module) for name, module in model.named_modules())
    return {name: module for name, module in named if any(regex.fullmatch(name) for regex in regexes)}


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))


def find_roles(model: nn.Module, plan: ParallelPlan) -> Roles:
    """Return which modules of `model` run before the blocks, are blocks, and run after them.

    Raises:
        LayoutError: If a name of the plan matches nothing.
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
        LayoutError: If a name of the plan matches nothing.
    """
    styles = plan.get("tensor", {})
    found = match_names(model, styles, parameters=True)
    return {name: style for pattern, style in styles.items() for name in found[pattern]}


def check_plan(
    plan: ParallelPlan,
    degrees: Degrees,
    *,
    sequence_length: int | None = None,
    options: ParallelOptions | None = None,
) -> None:
    """Check that a model can be split as asked, without touching it.

    Args:
        plan: The model's plan.
        degrees: The layout.
        sequence_length: Tokens per sequence, if known.
        options: Those that the model will be parallelized with; the defaults if None.

    Raises:
        LayoutError: With every misfit, and degrees that would fit.
    """
    unknown = sorted(plan.keys() - ParallelPlan.__annotations__.keys())
    if unknown:
        raise LayoutError(f"unknown entries of the plan {unknown}; there are {list(ParallelPlan.__annotations__)}")
    styles = set(plan.get("tensor", {}).values()) - set(get_args(TensorStyle))
    if styles:
        raise LayoutError(f"unknown tensor-parallel styles {sorted(styles)}; there are {list(get_args(TensorStyle))}")
    options = options or ParallelOptions()
    check_options(options, degrees)
    _check_experts(plan, degrees)
    tp = degrees.tp
    if degrees.cp > 1:
        _check_context(plan, degrees, options, sequence_length)
    if tp == 1:
        return
    if not plan.get("tensor"):
        raise LayoutError(f"tp is {tp}, but the plan says under 'tensor' of no module how to split it")
    sizes = dict(plan.get("divisible", {}))
    if sequence_length is not None and options.sequence_parallel and degrees.cp == 1:
        sizes["sequence length (sequence parallel)"] = sequence_length
    shared = _shared_heads(plan)
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % tp]
    if not _can_share(shared, tp):
        wrong.append(f"key/value heads {shared} (of which it is no multiple either)")
    if wrong:
        most = min(sizes.values(), default=shared)
        fits = [
            d for d in range(1, most + 1) if all(size % d == 0 for size in sizes.values()) and _can_share(shared, d)
        ]
        raise LayoutError(f"tp {tp} does not divide {', '.join(wrong)}; these degrees would: {fits}")


def _check_experts(plan: ParallelPlan, degrees: Degrees) -> None:
    experts, n_experts, ep = plan.get("experts"), plan.get("n_experts"), degrees.ep
    if ep > 1 and not experts:
        raise LayoutError(
            f"ep is {ep}, but the plan names no module under 'experts' to spread over ranks: take ep 1, and these "
            "ranks for dp_shard"
        )
    if ep > 1 and n_experts is not None and n_experts % ep:
        fits = [d for d in range(1, n_experts + 1) if n_experts % d == 0]
        raise LayoutError(f"ep {ep} does not divide the number of experts, {n_experts}; these degrees would: {fits}")
    styles = plan.get("tensor", {})
    if degrees.tp > 1 and experts and styles and "mixture" not in styles.values():
        raise LayoutError(
            f"tp is {degrees.tp} and the plan names experts ({', '.join(experts)}), but under 'tensor' no module is a "
            "'mixture' that holds them: without it each rank would compute them in whole; take tp 1, or name it"
        )


def _shared_heads(plan: ParallelPlan) -> int:
    """Return the number of key/value heads that ranks may share, or 0 if no module says that they may."""
    if "colwise_kv" not in plan.get("tensor", {}).values():
        return 0
    if "heads" not in plan:
        raise LayoutError("the plan says 'colwise_kv' of a module, but not under 'heads' how many heads there are")
    return plan["heads"][1]


def _can_share(heads: int, ranks: int) -> bool:
    return heads % ranks == 0 or ranks % heads == 0


def _check_context(plan: ParallelPlan, degrees: Degrees, options: ParallelOptions, sequence_length: int | None) -> None:
    cp, kind = degrees.cp, options.context
    if kind not in get_args(ContextKind):
        raise LayoutError(f"unknown kind of context parallelism {kind!r}; there are {list(get_args(ContextKind))}")
    if "attention" not in plan or not plan.get("sequence"):
        lacking = [entry for entry in ("attention", "sequence") if not plan.get(entry)]
        raise LayoutError(
            f"cp is {cp}, but the plan does not say {' and '.join(map(repr, lacking))}: context parallelism has to "
            "know which modules compute attention and which inputs hold the sequence, by name and dim; or take cp 1"
        )
    if "positions" not in plan:
        raise LayoutError(
            f"cp is {cp}, but the plan does not say under 'positions' which input numbers them: positions that a model "
            "counts by itself would be those in a rank's part of the sequence; if it has none, say None"
        )
    positions = plan["positions"]
    if positions is not None and positions not in plan["sequence"]:
        raise LayoutError(
            f"the plan's 'positions', {positions!r}, is not among its 'sequence', {dict(plan['sequence'])}"
        )
    if kind == "ulysses" and "heads" in plan:
        check_heads(plan["heads"][0], cp, degrees.tp)
    if sequence_length is not None:
        check_length(sequence_length, cp, kind, degrees.tp if options.sequence_parallel else 1)
