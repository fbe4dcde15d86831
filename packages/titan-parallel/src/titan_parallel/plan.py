"""The plan: what titan-parallel needs to know of a model, as plain data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

from torch import nn
from typing_extensions import ReadOnly

from titan_parallel.context_layout import check_heads, check_length
from titan_parallel.errors import LayoutError
from titan_parallel.mesh import Degrees
from titan_parallel.options import ContextKind, ParallelOptions

TensorStyle = Literal["vocab", "sequence", "gather", "colwise", "rowwise", "logits", "local", "replicate"]

_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod")


class ParallelPlan(TypedDict, total=False):
    """Which modules play which role. Every entry may be left out.

    Names are dotted module names; `*` stands for any run of characters within one part (`layers.*` is every layer,
    `layers.*.attn` every layer's attention).

    Attributes:
        blocks: The repeated blocks: the unit of sharding, of activation checkpointing and of compilation.
        before: Modules that run before the first block; each is sharded by itself.
        after: Modules that run after the last block; sharded together.
        tensor: Tensor-parallel style of modules. Of two patterns that match one module the later one holds. Every
            parameter has to be under a module with a style other than `gather`:
            `vocab` an embedding table split over its rows;
            `colwise` a linear split over its outputs;
            `rowwise` a linear split over its inputs, its output summed over the ranks;
            `sequence` a norm or the like that works on each position by itself;
            `gather` a module whose tensor inputs must hold the whole sequence;
            `logits` the last linear, split over the vocabulary, whose output stays split for the loss;
            `local` a module between `colwise` and `rowwise` that works on each rank's share by itself, with the same
            parameters on every rank, as a norm over single heads; it must treat each entry of dim 0 alike;
            `replicate` a module, or a single parameter by its name, that every rank holds and computes in whole.
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
            context parallelism fills it in, counting from 0.
        heads: Numbers of query heads and of key/value heads.
        experts: Modules that hold the experts of a mixture, each weight with one expert for each entry of dim 0. They
            are called as `experts(x, counts)`, x `[N, D]` with the rows of expert 0 first, then those of expert 1,
            and so on, counts integers `[E]`, the rows of each; they return `[N, D]`.
    """

    blocks: ReadOnly[Sequence[str]]
    before: ReadOnly[Sequence[str]]
    after: ReadOnly[Sequence[str]]
    tensor: ReadOnly[Mapping[str, str]]
    tied: ReadOnly[Sequence[tuple[str, str]]]
    divisible: ReadOnly[Mapping[str, int]]
    attention: ReadOnly[Sequence[str]]
    sequence: ReadOnly[Mapping[str, int]]
    positions: ReadOnly[str]
    heads: ReadOnly[tuple[int, int]]
    experts: ReadOnly[Sequence[str]]


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
        regex = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
        found[pattern] = [name for name in names if regex.fullmatch(name)]
        if not found[pattern]:
            near = difflib.get_close_matches(pattern.replace("*", "0"), names, n=3, cutoff=0.4)
            wrong.append(f"{pattern!r} (nearest: {', '.join(near) or 'none'})")
    if wrong:
        raise LayoutError(f"the plan names modules that {type(model).__name__} does not have: {'; '.join(wrong)}")
    return found


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
    tp = degrees.tp
    if degrees.cp > 1:
        _check_context(plan, degrees, options, sequence_length)
    if tp == 1:
        return
    if plan.get("experts"):
        raise LayoutError(
            f"tp is {tp}, but the plan names experts ({', '.join(plan['experts'])}): a mixture of experts cannot be "
            "split by tensor parallelism yet; take tp 1, and shard the model over all ranks with dp_shard"
        )
    if not plan.get("tensor"):
        raise LayoutError(f"tp is {tp}, but the plan says under 'tensor' of no module how to split it")
    sizes = dict(plan.get("divisible", {}))
    if sequence_length is not None and options.sequence_parallel and degrees.cp == 1:
        sizes["sequence length (sequence parallel)"] = sequence_length
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % tp]
    if wrong:
        fits = [d for d in range(1, min(sizes.values()) + 1) if all(size % d == 0 for size in sizes.values())]
        raise LayoutError(f"tp {tp} does not divide {', '.join(wrong)}; these degrees would: {fits}")


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
    positions = plan.get("positions")
    if positions is not None and positions not in plan["sequence"]:
        raise LayoutError(
            f"the plan's 'positions', {positions!r}, is not among its 'sequence', {dict(plan['sequence'])}"
        )
    if kind == "ulysses" and "heads" in plan:
        check_heads(plan["heads"][0], cp, degrees.tp)
    if sequence_length is not None:
        check_length(sequence_length, cp, kind, degrees.tp if options.sequence_parallel else 1)
