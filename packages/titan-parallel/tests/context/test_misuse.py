"""Misuse of context parallelism raises errors that say what to change, before anything is sent."""

from __future__ import annotations

import pytest

import parallel_context as cases
from ranks import Ranks
from titan_parallel import Degrees, LayoutError, ParallelOptions, check_plan

PLAN = cases.PLAN


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sequence": {}}, "cp=2 requires plan['sequence']"),
        ({"positions": "rows"}, "plan['positions']: 'rows' is not in plan['sequence'], {'tokens': 1"),
        (
            {"sequence": {"tokens": 1, "places": 1, "documents": 1}},
            "the forward of Net does not take: 'documents' (nearest: document_ids, ",
        ),
        ({"attention": ["stack.*.attn.cores"]}, "'stack.*.attn.cores' (nearest: stack.0.attn.core"),
        ({"attention": ["stack.*.attn"]}, "have parameters: stack.0.attn, stack.1.attn; name the modules"),
    ],
    ids=["no-sequence", "positions", "input", "glob", "parameters"],
)
def test_refusals(ranks2: Ranks, changed: dict, says: str) -> None:
    for message in ranks2.run(cases.refusal, changed, "allgather"):
        assert says in message


def test_a_plan_without_attention() -> None:
    plan = {name: entry for name, entry in PLAN.items() if name not in ("attention", "sequence", "positions")}
    check_plan(plan, Degrees(dp_shard=2))
    with pytest.raises(LayoutError, match=r"requires plan\['attention'\] and plan\['sequence'\].* or set cp=1"):
        check_plan(plan, Degrees(dp_shard=1, cp=2))


def test_kinds() -> None:
    with pytest.raises(LayoutError, match=r"context: 'rings' is not one of \['allgather', "):
        check_plan(PLAN, Degrees(cp=2), options=ParallelOptions(context="rings"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "degrees", "says"),
    [
        ("ulysses", Degrees(cp=3), "cp 3 does not divide 4 query heads; these degrees of cp would: [1, 2, 4]; or set"),
        (
            "ulysses",
            Degrees(cp=4, tp=2),
            "cp 4 and tp 2 does not divide 4 query heads; these degrees of cp would: [1, 2];",
        ),
        ("ring", Degrees(cp=3, tp=2), None),
        ("ulysses", Degrees(cp=4), None),
    ],
)
def test_heads(kind: str, degrees: Degrees, says: str | None) -> None:
    assert refusal(degrees, ParallelOptions(context=kind)).find(says or "") >= 0
    assert bool(says) == bool(refusal(degrees, ParallelOptions(context=kind)))


@pytest.mark.parametrize(
    ("kind", "degrees", "length", "says"),
    [
        (
            "allgather",
            Degrees(cp=4),
            20,
            "into 8 chunks, two for each rank of cp 4: its length must be a multiple of 8, which 20 is not; the "
            "nearest are 16 and 24; these degrees of cp would divide it: [1, 2, 5, 10]",
        ),
        ("ulysses", Degrees(cp=4), 20, ""),
        ("ulysses", Degrees(cp=4), 18, "into cp 4 parts: its length must be a multiple of 4, which 18 is not"),
        (
            "ring",
            Degrees(cp=2, tp=4),
            12,
            "each part split over tp 4 (sequence parallelism): its length must be a multi",
        ),
        ("ring", Degrees(cp=2, tp=2), 12, ""),
        (
            "ring",
            Degrees(cp=2),
            3,
            "a multiple of 4, which 3 is not; the nearest are 4; no degree of cp would divide it",
        ),
    ],
)
def test_lengths(kind: str, degrees: Degrees, length: int, says: str) -> None:
    message = refusal(degrees, ParallelOptions(context=kind), length, heads=4 * degrees.tp)
    assert says in message
    assert bool(says) == bool(message)


def test_lengths_without_sequence_parallel() -> None:
    # 12 tokens over cp 2 are 6 a rank, which tp 4 need not divide then.
    assert refusal(Degrees(cp=2, tp=4), ParallelOptions(sequence_parallel=False), 12, heads=16) == ""
    assert refusal(Degrees(tp=8), ParallelOptions(sequence_parallel=False), 12, heads=16) == ""
    assert "sequence length (sequence parallel) 12" in refusal(Degrees(tp=8), ParallelOptions(), 12, heads=16)


def refusal(degrees: Degrees, options: ParallelOptions, length: int | None = None, heads: int = 4) -> str:
    plan = {**PLAN, "divisible": {"heads": heads}}
    try:
        check_plan(plan, degrees, sequence_length=length, options=options)
    except LayoutError as error:
        return str(error)
    return ""


def test_wrong_calls(ranks2: Ranks) -> None:
    for length, lengths, target, nothing, unnamed in ranks2.run(cases.wrong_calls):
        assert "must be a multiple of 4, which 6 is not; the nearest are 4 and 8" in length
        assert lengths.endswith("sequences of different lengths: {'tokens': 16, 'document_ids': 8}")
        assert target.startswith("target: has the shape [4, 8], but plan['sequence'] states its sequences are in dim 1")
        assert "any of the inputs in plan['sequence'], ['document_ids', 'places', 'tokens']" in nothing
        assert unnamed.startswith(
            "the model's forward has 2 named positional parameters, but got 3 positional arguments"
        )
