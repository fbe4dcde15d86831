"""Misuse raises errors that say what to change; evaluating changes nothing; gradients accumulate."""

from __future__ import annotations

import pytest
import torch

import parallel_misuse as misuse
from parallel_cases import plan
from ranks import Ranks
from titan_parallel import Degrees, LayoutError, check_plan

WITHOUT_INNER = {name: style for name, style in plan(False)["tensor"].items() if not name.startswith("stack.*.mlp.")}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"divisible": {"heads": 3}}, "tp 2 does not divide heads 3; these degrees would: [1, 3]"),
        ({"blocks": ["stock.*"]}, "'stock.*' (nearest: stack.0"),
        ({"tensor": {}}, "tp=2 requires plan['tensor']"),
        ({"tensor": {"table": "colums"}}, "plan['tensor']: unknown styles ['colums']"),
        ({"tensor": {"tabel": "vocab", "lost": "sequence"}}, "'tabel' (nearest: table"),
        (
            {"experts": ["stack.*.mlp"]},
            "plan['experts'] names stack.*.mlp, but no module in plan['tensor'] has the style 'mixture'",
        ),
        ({"tensor": {"stack.*.norm1": "colwise"}}, "'stack.0.norm1' is a LayerNorm, but 'colwise' splits nn.Linear"),
        (
            {"tensor": {"last.weight": "sequence"}},
            "'last.weight' is a parameter, for which the only style is 'replicate'",
        ),
        (
            {"tensor": WITHOUT_INNER},
            "covers stack.0.mlp.0.weight, stack.0.mlp.0.bias, stack.0.mlp.2.weight, stack.0.mlp.2.bias, stack.1.mlp.0",
        ),
    ],
    ids=["divide", "glob", "no-plan", "style", "tensor-glob", "experts", "kind", "parameter", "uncovered"],
)
def test_refusals(ranks2: Ranks, changed: dict, says: str) -> None:
    for message in ranks2.run(misuse.refusal, Degrees(tp=2), False, changed):
        assert says in message


def test_experts_that_are_not_there(ranks2: Ranks) -> None:
    for message in ranks2.run(misuse.refusal, Degrees(), False, {"experts": ["stack.*.moe"]}):
        assert "'stack.*.moe' (nearest: stack.0" in message


@pytest.mark.parametrize(
    ("shared", "changed", "says"),
    [
        (
            True,
            {},
            "('vocab_out.weight', 'table.weight') is one parameter of the model, but not in plan['tied']; add it",
        ),
        (
            False,
            {"tied": [("vocab_out.weight", "table.weight")]},
            "'vocab_out.weight' and 'table.weight' are tied in the plan, but are not one parameter",
        ),
        (
            True,
            {"tied": [("vocab_out.weight", "table.weight")], "after": ["last"]},
            "'vocab_out.weight' and 'table.weight' are one parameter, but in different FSDP units",
        ),
    ],
    ids=["unknown", "untied", "units"],
)
def test_refusals_of_tied_weights(ranks2: Ranks, shared: bool, changed: dict, says: str) -> None:
    for message in ranks2.run(misuse.refusal, Degrees(), shared, changed):
        assert says in message


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("degrees", "the layout is Degrees(dp_replicate=1, dp_shard=-1"),
        ("plan", "the plan's 'after' is ['last', 'vocab_out'] on rank 0 and ['vocab_out', 'last'] on rank 1"),
        ("options", "option compile_blocks is False on rank 0 and True on rank 1"),
        ("frozen", "the parameters' names, shapes, dtypes and requires_grad is [("),
        ("weights", "the first element of each parameter is ["),
        ("num_target_tokens", "num_target_tokens is 1.0 on rank 0 and 2.0 on rank 1"),
        ("forward_backward", "the number of microbatches of forward_backward is 1 on rank 0 and 2 on rank 1"),
        ("evaluate", "the number of microbatches of evaluate is 1 on rank 0 and 2 on rank 1"),
    ],
)
def test_ranks_that_disagree(ranks2: Ranks, what: str, says: str) -> None:
    for message in ranks2.run(misuse.disagreement, what):
        assert message.startswith("LayoutError: ranks got different arguments and would wait for one another forever: ")
        assert says in message


def test_what_was_laid_out_before(ranks2: Ranks) -> None:
    for sharded, again, wrapped, parallel, mesh in ranks2.run(misuse.laid_out_before):
        assert sharded.startswith("LayoutError: model: Net is sharded already (stack.1)")
        assert again.startswith("LayoutError: model: FSDPNet is sharded already (the root)")
        assert wrapped.startswith("LayoutError: model: is wrapped by DistributedDataParallel; pass its `module`")
        assert parallel == "LayoutError: model: is a ParallelModel already; pass the original module"
        assert mesh.startswith("LayoutError: mesh: has the dims ('dp',), not ('pp', ")


def test_states_of_other_layouts(ranks2: Ranks) -> None:
    for plain, other in ranks2.run(misuse.states_of_other_layouts):
        assert "table.weight is a regular tensor, but on a mesh of ('fsdp',) [2] in the model: distribute it" in plain
        assert "table.weight is on a mesh of ('tp',) [2], but on a mesh of ('fsdp',) [2]" in other


def test_dropout_of_what_ranks_have_in_whole(ranks2: Ranks) -> None:
    for message in ranks2.run(misuse.dropped, 1, False):
        assert message.startswith("LayoutError: ranks got different arguments")
        assert "the state of torch's random generator (for dropout) is " in message
    for seed, sequence_parallel in ((0, False), (1, True)):
        assert ranks2.run(misuse.dropped, seed, sequence_parallel) == ["no error"] * 2


def test_parameters_that_cannot_be_sharded(ranks2: Ranks) -> None:
    for message in ranks2.run(misuse.unshardable, Degrees()):
        assert "last.temperature is a scalar, give it the shape [1]" in message
        assert "vocab_out.weight [32, 32] has the strides [1, 32], make it contiguous" in message
    assert ranks2.run(misuse.unshardable, Degrees(tp=2)) == ["no error"] * 2


def test_unknown_entries_of_the_plan() -> None:
    with pytest.raises(LayoutError, match=r"plan: unknown entries \['block'\]; the entries are \['blocks', "):
        check_plan({"block": ["stack.*"]}, Degrees())  # type: ignore[typeddict-unknown-key]


def test_wrong_calls(ranks2: Ranks) -> None:
    for no_step, nothing_to_evaluate, no_number, incomplete, misshapen in ranks2.run(misuse.wrong_calls):
        assert no_step.startswith("ValueError: microbatches: is empty; pass at least one")
        assert nothing_to_evaluate.startswith("ValueError: microbatches: is empty; pass at least one")
        assert no_number.endswith("the sum of its losses, a scalar tensor, but returned a tensor [32]")
        assert "missing ['table.weight'], unexpected []" in incomplete
        assert misshapen == "ValueError: the state does not fit the model: last.bias is (1,), not (32,)"


def test_a_look_changes_nothing(ranks2: Ranks) -> None:
    # FSDP keeps some weights gathered after a forward; an update or an optimizer must not meet them.
    plain, evaluated, predicted = (
        ranks2.run(misuse.look_between, Degrees(), look)[0] for look in ("", "evaluate", "predict")
    )
    for name, weight in plain.items():
        assert torch.equal(evaluated[name], weight)
        assert torch.equal(predicted[name], weight)


def test_modes_come_back_after_an_error(ranks2: Ranks) -> None:
    assert ranks2.run(misuse.modes_after_an_error) == [(True, ["stack.1"])] * 2


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tp=2)], ids=["fsdp", "tp"])
def test_gradients_add_up_over_calls(ranks2: Ranks, degrees: Degrees) -> None:
    assert max(ranks2.run(misuse.add_twice, degrees)) < 1e-6


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(tp=2)], ids=["fsdp", "tp"])
def test_norm_of_low_precision_gradients(ranks2: Ranks, degrees: Degrees) -> None:
    for norm, exact, is_fp32 in ranks2.run(misuse.norm_of_bf16, degrees):
        assert norm == pytest.approx(exact, rel=1e-5)
        assert is_fp32
