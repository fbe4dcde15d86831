"""Checks of a plan, a layout and options against one another, without a model and without processes.

`check_plan` is public: call it before a run is launched. `parallelize` calls it again on every rank.
"""

from __future__ import annotations

from typing import get_args

from titan_parallel.context.layout import check_heads, check_length
from titan_parallel.degrees import Degrees
from titan_parallel.errors import LayoutError
from titan_parallel.options import ParallelOptions
from titan_parallel.plan import ParallelPlan, TensorStyle


def check_plan(
    plan: ParallelPlan,
    degrees: Degrees,
    *,
    sequence_length: int | None = None,
    options: ParallelOptions | None = None,
) -> None:
    """Check that a layout and options fit a model's plan, without the model.

    Args:
        plan: The model's plan.
        degrees: The layout; a `dp_shard` of -1 fits everything.
        sequence_length: Tokens per sequence, if known.
        options: The options that the model will be parallelized with; the defaults if None.

    Raises:
        LayoutError: If something does not fit; the message lists degrees that would.
    """
    unknown = sorted(plan.keys() - ParallelPlan.__annotations__.keys())
    if unknown:
        raise LayoutError(f"plan: unknown entries {unknown}; the entries are {list(ParallelPlan.__annotations__)}")
    styles = set(plan.get("tensor", {}).values()) - set(get_args(TensorStyle))
    if styles:
        raise LayoutError(
            f"plan['tensor']: unknown styles {sorted(styles)}; the styles are {list(get_args(TensorStyle))}"
        )
    options = options or ParallelOptions()
    wrong = [*_wrong_resharding(options, degrees), *_wrong_overlap(options, degrees)]
    if wrong:
        raise LayoutError("; ".join(wrong))
    _check_experts(plan, degrees)
    if degrees.cp > 1:
        _check_context(plan, degrees, options, sequence_length)
    if degrees.tp > 1:
        _check_tensor(plan, degrees, options, sequence_length)


def _check_tensor(plan: ParallelPlan, degrees: Degrees, options: ParallelOptions, sequence_length: int | None) -> None:
    tp = degrees.tp
    if not plan.get("tensor"):
        raise LayoutError(
            f"tp={tp} requires plan['tensor'] (a style for each module), but it is empty; add it or set tp=1"
        )
    sizes = dict(plan.get("divisible", {}))
    if sequence_length is not None and options.sequence_parallel and degrees.cp == 1:
        sizes["sequence length (sequence parallel)"] = sequence_length
    kv_heads = _shared_heads(plan)
    wrong = [f"{name} {size}" for name, size in sizes.items() if size % tp]
    if not _can_share(kv_heads, tp):
        wrong.append(f"key/value heads {kv_heads} (and is not a multiple of them either)")
    if wrong:
        most = min(sizes.values(), default=kv_heads)
        fits = [
            d for d in range(1, most + 1) if all(size % d == 0 for size in sizes.values()) and _can_share(kv_heads, d)
        ]
        raise LayoutError(f"tp {tp} does not divide {', '.join(wrong)}; these degrees would: {fits}")


def _check_experts(plan: ParallelPlan, degrees: Degrees) -> None:
    experts, n_experts, ep = plan.get("experts"), plan.get("n_experts"), degrees.ep
    if ep > 1 and not experts:
        raise LayoutError(
            f"ep={ep} requires plan['experts'] (the modules to distribute over ranks), but it is empty; set ep=1 and "
            "use these ranks for dp_shard"
        )
    if ep > 1 and n_experts is not None and n_experts % ep:
        fits = [d for d in range(1, n_experts + 1) if n_experts % d == 0]
        raise LayoutError(f"ep {ep} does not divide the number of experts, {n_experts}; these degrees would: {fits}")
    styles = plan.get("tensor", {})
    if degrees.tp > 1 and experts and styles and "mixture" not in styles.values():
        raise LayoutError(
            f"tp={degrees.tp} and plan['experts'] names {', '.join(experts)}, but no module in plan['tensor'] has the "
            "style 'mixture', so every rank would compute all experts in full; add the style to the module that holds "
            "them, or set tp=1"
        )


def _shared_heads(plan: ParallelPlan) -> int:
    """Return the number of key/value heads that ranks may share, or 0 if no module has the style `colwise_kv`."""
    if "colwise_kv" not in plan.get("tensor", {}).values():
        return 0
    if "heads" not in plan:
        raise LayoutError(
            "plan['tensor'] uses 'colwise_kv', which requires plan['heads'] (query heads, key/value heads)"
        )
    return plan["heads"][1]


def _can_share(heads: int, ranks: int) -> bool:
    return heads % ranks == 0 or ranks % heads == 0


def _check_context(plan: ParallelPlan, degrees: Degrees, options: ParallelOptions, sequence_length: int | None) -> None:
    cp, kind = degrees.cp, options.context
    if "attention" not in plan or not plan.get("sequence"):
        lacking = [f"plan[{entry!r}]" for entry in ("attention", "sequence") if not plan.get(entry)]
        raise LayoutError(
            f"cp={cp} requires {' and '.join(lacking)}: the modules that compute attention, and the inputs that hold "
            "the sequence, by name and dim; add them or set cp=1"
        )
    if "positions" not in plan:
        raise LayoutError(
            f"cp={cp} requires plan['positions'], the input that numbers the tokens: a model that counts positions "
            "itself would count within a rank's part of the sequence; set it to None if the model uses no positions"
        )
    positions = plan["positions"]
    if positions is not None and positions not in plan["sequence"]:
        raise LayoutError(f"plan['positions']: {positions!r} is not in plan['sequence'], {dict(plan['sequence'])}")
    if kind == "ulysses" and "heads" in plan:
        check_heads(plan["heads"][0], cp, degrees.tp)
    if sequence_length is not None:
        check_length(sequence_length, cp, kind, degrees.tp if options.sequence_parallel else 1)


def _wrong_resharding(options: ParallelOptions, degrees: Degrees) -> list[str]:
    wanted = options.reshard_after_forward
    if isinstance(wanted, str) or degrees.dp_shard < 0:
        return []
    ranks = degrees.dp_shard * degrees.cp * degrees.ep
    fits = [n for n in range(2, ranks) if ranks % n == 0]
    if wanted in fits:
        return []
    return [
        f"reshard_after_forward: {wanted} does not divide the {ranks} ranks that shard the weights (dp_shard x cp x "
        f"ep) into equal groups; these numbers would: {fits}; or set 'always' or 'never'"
    ]


def _wrong_overlap(options: ParallelOptions, degrees: Degrees) -> list[str]:
    if not options.async_tp:
        return []
    requirements = {
        "tp above 1": degrees.tp > 1,
        "sequence_parallel": options.sequence_parallel,
        "compile_blocks": options.compile_blocks,
        "compile_backend 'inductor'": options.compile_backend == "inductor",
    }
    missing = [requirement for requirement, is_met in requirements.items() if not is_met]
    return [f"async_tp: requires {', '.join(missing)}"] if missing else []
