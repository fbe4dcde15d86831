"""Load balancing: the loss that never leaves its block, the bias that has no loss, and what is counted for both."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from model_experts import chosen_of, gradients, random_input, random_mixture, randomize, scores_of, with_moe
from ranks import Ranks
from titan_model import Decoder, DecoderConfig, build
from titan_model.moe.layer import MoE
from titan_model.moe.load_balancing import balance_experts, set_num_target_tokens, set_sequence_sum


def balance_by_hand(module: MoE, x: Tensor) -> Tensor:
    """Return the balancing loss of `x` `[B, S, D]` without its coefficient, by its formula."""
    n_experts, top_k = module.router.moe.n_experts, module.router.moe.top_k
    total = torch.zeros(())
    for row in x:
        scores = scores_of(module, row)
        probabilities = scores / scores.sum(-1, keepdim=True)
        chosen = [e for token in scores for e in chosen_of(module, token)]
        for e in range(n_experts):
            share = chosen.count(e) / (len(row) * top_k)
            total = total + len(row) * n_experts * share * probabilities[:, e].mean()
    return total


def record_of(model: nn.Module) -> Tensor:
    return torch.stack([module.router.load for module in model.modules() if isinstance(module, MoE)])


@settings(deadline=None, max_examples=25)
@given(
    n_experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    score=st.sampled_from(["softmax", "sigmoid"]),
    rate=st.sampled_from([0.0, 0.1]),
    coefficient=st.sampled_from([0.01, 2.0]),
    num_target_tokens=st.sampled_from([1, 7.5]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6)),
)
def test_loss_adds_the_gradient_of_its_formula(
    n_experts: int,
    top_k: int,
    score: str,
    rate: float,
    coefficient: float,
    num_target_tokens: float,
    shape: tuple[int, int],
) -> None:
    options = {"n_experts": n_experts, "top_k": min(top_k, n_experts), "score": score, "balance_bias_rate": rate}
    plain, balanced = random_mixture(**options), random_mixture(**options, balance_loss=coefficient)
    x = random_input(*shape)
    set_num_target_tokens(balanced, num_target_tokens)
    without, found = gradients(plain, plain, x), gradients(balanced, balanced, x)
    by_hand = balance_by_hand(plain, x)
    of_x, of_router = torch.autograd.grad(coefficient * by_hand / num_target_tokens, (x, plain.router.weight))
    torch.testing.assert_close(found["x"], without["x"] + of_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["router.weight"], without["router.weight"] + of_router, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["experts.up_proj"], without["experts.up_proj"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(balance_experts(balanced)["experts/balance_loss"].float(), by_hand / math.prod(shape))


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_two_backwards_count_the_load_once(rate: float) -> None:
    once, twice = random_mixture(balance_bias_rate=rate), random_mixture(balance_bias_rate=rate)
    once(random_input(2, 5)).sum().backward()
    out = twice(random_input(2, 5))
    out.sum().backward(retain_graph=True)
    out.square().sum().backward()  # a second loss of the same forward
    assert once.router.load.sum() > 0
    assert torch.equal(once.router.load, twice.router.load)
    twice(random_input(2, 5)).sum().backward()  # another forward counts
    assert torch.equal(2 * once.router.load, twice.router.load)


def test_two_backwards_with_a_balancing_loss_are_refused() -> None:
    mixture = random_mixture(balance_loss=2.0)
    set_num_target_tokens(mixture, 1)
    out = mixture(random_input(2, 5))
    out.sum().backward(retain_graph=True)
    load = mixture.router.load.clone()
    with pytest.raises(RuntimeError, match="backward was called twice, and the balancing loss"):
        out.sum().backward()
    assert torch.equal(mixture.router.load, load)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_parts_of_a_sequence_add_up_to_its_loss(score: str) -> None:
    options = {"score": score, "balance_loss": 2.0}
    whole, x = random_mixture(**options), random_input(3, 8)
    set_num_target_tokens(whole, 1)
    out_grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    whole(x).backward(out_grad)
    recorded = whole.router.load.clone()
    assert x.grad is not None
    for together in (True, False):
        parts = random_mixture(**options)
        set_num_target_tokens(parts, 1)
        # Each part sees what all of them would have counted, in the way in which ranks would tell one another.
        halves = [half.detach().requires_grad_() for half in x.split([3, 5], dim=1)]
        counted: list[Tensor] = []
        set_sequence_sum(parts, lambda counts, counted=counted: counted.append(counts) or counts)
        for half in halves:
            parts(half)
        if together:
            set_sequence_sum(parts, lambda _, counted=counted: counted[0] + counted[1])
        else:
            set_sequence_sum(parts, None)
        for half, grad in zip(halves, out_grad.split([3, 5], dim=1), strict=True):
            parts(half).backward(grad)
        found = torch.cat([half.grad for half in halves if half.grad is not None], 1)
        router_grad, expected = parts.router.weight.grad, whole.router.weight.grad
        assert router_grad is not None
        assert expected is not None
        same = torch.allclose(found, x.grad, atol=1e-5) and torch.allclose(router_grad, expected, atol=1e-5)
        assert same is together
        assert torch.allclose(parts.router.load, recorded, rtol=1e-5) is together


def test_loss_is_one_per_token_where_load_is_even_and_more_elsewhere() -> None:
    module = random_mixture(n_experts=4, top_k=1)
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[:, :4] = torch.eye(4) * 30
    even, uneven = torch.zeros(1, 8, 16), torch.zeros(1, 8, 16)
    for i in range(8):
        even[0, i, i % 4] = 1
        uneven[0, i, 0] = 1
    for x, expected in ((even, 1.0), (uneven, 4.0)):
        module(x).sum().backward()
        assert balance_experts(module)["experts/balance_loss"] == pytest.approx(expected, rel=1e-5)


def test_even_load_of_transformers_loss_is_k_times_ours() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    module, x = random_mixture(n_experts=6, top_k=2), random_input(1, 12)
    theirs = modeling.load_balancing_loss_func((x[0] @ module.router.weight.t(),), 6, 2)
    module(x).sum().backward()
    torch.testing.assert_close(balance_experts(module)["experts/balance_loss"].float() * 2, theirs.detach())


def test_a_training_step_without_num_target_tokens_is_refused() -> None:
    module, x = random_mixture(balance_loss=0.1), random_input(1, 3)
    with pytest.raises(
        RuntimeError, match=r"call titan_model\.set_num_target_tokens\(model, num_target_tokens\) before"
    ):
        module(x)
    with torch.no_grad():
        module(x)  # no gradient, no question
    module.eval()
    module(x).sum().backward()
    assert not module.router.load.any()
    set_num_target_tokens(random_mixture(), 3)  # nothing to tell, nothing refused


def one_step(model: Decoder, tokens: Tensor, rows: int) -> dict[str, Tensor]:
    """Return the gradients of the mean loss over all tokens, taken `rows` rows at a time."""
    set_num_target_tokens(model, tokens.numel())
    for part in tokens.split(rows):
        loss = model(part, labels=part).total / tokens.numel()
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def balanced_decoder(**changes: object) -> Decoder:
    options: dict[str, Any] = {"balance_loss": 0.1, "balance_bias_rate": 0.01, **changes}
    model = build(with_moe(**options), "cpu")
    randomize(model)
    return model


def tokens_of(rows: int, length: int = 12) -> Tensor:
    return torch.randint(0, 29, (rows, length), generator=torch.Generator().manual_seed(5))


def test_microbatches_change_neither_gradient_nor_count() -> None:
    whole, parts = balanced_decoder(), balanced_decoder()
    tokens = tokens_of(6)
    expected, got = one_step(whole, tokens, 6), one_step(parts, tokens, 2)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(record_of(parts), record_of(whole))
    assert record_of(whole)[:, :4].sum(1).tolist() == [6 * 12 * 2] * 2


def test_the_loss_reaches_gradients_and_nothing_else() -> None:
    with_loss, without = balanced_decoder(), balanced_decoder(balance_loss=0.0)
    tokens = tokens_of(3)
    a, b = one_step(with_loss, tokens, 3), one_step(without, tokens, 3)
    assert not torch.allclose(a["layers.1.ffn.router.weight"], b["layers.1.ffn.router.weight"], rtol=1e-3)
    for name in ("head.weight", "norm.weight", "layers.1.ffn.experts.down_proj"):  # nothing of it is upstream
        torch.testing.assert_close(a[name], b[name])
    sums = [model(tokens, labels=tokens).total for model in (with_loss, without)]
    assert torch.equal(sums[0], sums[1])


def test_bias_moves_against_load_by_its_rate() -> None:
    module = random_mixture(n_experts=4, top_k=1, balance_bias_rate=0.25)
    assert module.router.bias is not None
    module.router.bias.zero_()
    module.router.load.copy_(torch.tensor([8.0, 4, 4, 0, 0, 0]))
    balance_experts(module)
    assert module.router.bias.tolist() == [-0.25, 0, 0, 0.25]
    balance_experts(module)  # nothing counted since
    assert module.router.bias.tolist() == [-0.25, 0, 0, 0.25]


def test_bias_chooses_but_does_not_weigh() -> None:
    module, x = random_mixture(n_experts=4, top_k=2, normalize_top_k=False, balance_bias_rate=0.1), random_input(1, 9)
    assert module.router.bias is not None
    module.router.bias.copy_(torch.tensor([0.0, 0, 5, 5]))
    weights, chosen = module.router(x)
    assert set(chosen.flatten().tolist()) == {2, 3}
    torch.testing.assert_close(weights, scores_of(module, x).flatten(0, 1).gather(1, chosen))


def test_bias_evens_the_load_in_time() -> None:
    module = random_mixture(n_experts=8, top_k=2, score="sigmoid", balance_bias_rate=0.02)
    assert module.router.bias is not None
    module.router.bias.zero_()
    x = random_input(4, 64) + 1  # a mean makes favorites
    loads = []
    for _ in range(30):
        module(x).sum().backward()
        loads.append(float(balance_experts(module)["experts/max_load"]))
    assert loads[0] > 2
    assert loads[-1] < 1.25


def test_metrics_are_what_they_say() -> None:
    model = balanced_decoder(n_experts=4, top_k=2)
    first, second = (model.layers[name].ffn.router for name in "01")
    first.load.copy_(torch.tensor([10.0, 6, 4, 0, 5.0, 20.0]))
    second.load.copy_(torch.tensor([5.0, 5, 5, 5, 15.0, 10.0]))
    metrics = balance_experts(model)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"experts/max_load": 2.0, "experts/idle": 1 / 8, "experts/entropy": 1.0, "experts/balance_loss": 1.5}
    )
    nothing = {name: float(value) for name, value in balance_experts(model).items()}
    assert nothing["experts/idle"] == 1
    assert all(math.isfinite(value) for value in nothing.values())


def test_entropy_is_that_of_the_scores() -> None:
    module, x = random_mixture(n_experts=5), random_input(2, 7)
    module(x).sum().backward()
    p = scores_of(module, x)
    expected = -(p * p.log()).sum(-1).mean().detach()
    torch.testing.assert_close(balance_experts(module)["experts/entropy"].float(), expected)


def test_loads_are_summed_over_ranks_at_once() -> None:
    model, calls = balanced_decoder(), []
    for name in "01":
        model.layers[name].ffn.router.load.copy_(torch.tensor([8.0, 0, 0, 0, 1.0, 1.0]))
        model.layers[name].ffn.router.bias.zero_()

    def others_had_the_other_experts(record: Tensor) -> None:
        calls.append(tuple(record.shape))
        record += torch.tensor([0.0, 8, 8, 4, 1, 1])

    metrics = balance_experts(model, others_had_the_other_experts)
    assert calls == [(2, 6)]
    assert float(metrics["experts/max_load"]) == pytest.approx(8 / 7)
    for name in "01":
        assert model.layers[name].ffn.router.bias.tolist() == pytest.approx([-0.01, -0.01, -0.01, 0.01])


def test_a_model_without_experts_has_nothing_to_balance(tiny: DecoderConfig) -> None:
    assert balance_experts(build(tiny, "meta"), lambda record: pytest.fail("nothing to sum")) == {}


def test_state_is_the_bias_alone() -> None:
    assert [name for name in balanced_decoder().state_dict() if "router" in name] == [
        f"layers.{i}.ffn.router.{kind}" for i in range(2) for kind in ("weight", "bias")
    ]
    assert not [name for name in balanced_decoder(balance_bias_rate=0.0).state_dict() if name.endswith("bias")]


def test_buffers_are_whole_and_wide_after_any_move() -> None:
    model = build(with_moe(balance_bias_rate=0.1), "meta")
    model.to_empty(device="cpu")
    routers = [block.ffn.router for block in model.layers.values()]
    for router in routers:
        assert not router.load.any()
        assert not router.bias.any()
        router.bias.copy_(torch.tensor([1 / 3, 0, 1, -1]))
    model.to(torch.bfloat16)
    for router in routers:
        assert router.weight.dtype == torch.bfloat16
        assert router.load.dtype == router.bias.dtype == torch.float32
        assert router.bias.tolist() == pytest.approx([1 / 3, 0, 1, -1], rel=1e-7)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: nn.Sequential(checkpoint_wrapper(model)),
        lambda model: torch.compile(model, backend="eager"),
        nn.DataParallel,
    ],
    ids=["regular", "checkpointed", "compiled", "replicated"],
)
def test_routers_are_found_through_wrappers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = balanced_decoder()
    before = [block.ffn.router.bias.clone() for block in model.layers.values()]
    wrapped = wrap(model)
    set_num_target_tokens(wrapped, torch.tensor(4))
    for block in model.layers.values():
        assert block.ffn.router.num_target_tokens == 4
        block.ffn.router.load[0] = 1
    assert balance_experts(wrapped)
    for block, old in zip(model.layers.values(), before, strict=True):
        assert not torch.equal(block.ffn.router.bias, old)


def train(model: nn.Module, tokens: Tensor, n_tokens: int, all_reduce: Callable[[Tensor], None] | None) -> list[float]:
    """Take three steps and return the metrics of each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        set_num_target_tokens(model, n_tokens)
        for row in tokens.split(1):
            (model(row, labels=row).total / n_tokens).backward()
        seen += [float(value) for value in balance_experts(model, all_reduce).values()]
        optimizer.step()
        optimizer.zero_grad()
    return seen


def sharded_training(config: DecoderConfig, tokens: Tensor) -> tuple[list[float], dict[str, list[float]]]:
    """Train on this rank's rows with FSDP2, sums of gradients instead of means, and activation checkpointing."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    model = build(config, "cpu")
    randomize(model)
    for name, block in model.layers.items():
        model.layers[name] = fully_shard(checkpoint_wrapper(block))
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    mine = tokens.chunk(dist.get_world_size())[dist.get_rank()]
    seen = train(model, mine, tokens.numel(), lambda record: dist.all_reduce(record))
    state = {
        name.replace("_checkpoint_wrapped_module.", ""): value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    return seen, {name: value.flatten().tolist() for name, value in state.items()}


def test_two_sharded_ranks_balance_as_one_process(ranks2: Ranks) -> None:
    config, tokens = with_moe(n_experts=5, balance_loss=0.5, balance_bias_rate=0.05), tokens_of(4)
    model = build(config, "cpu")
    randomize(model)
    start = copy.deepcopy(model.state_dict())
    seen = train(model, tokens, tokens.numel(), None)
    for got, state in ranks2.run(sharded_training, config, tokens):
        assert got == pytest.approx(seen, rel=1e-4)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(torch.tensor(state[name]), value.flatten(), rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(start[name], value) for name, value in model.state_dict().items())
    assert all(first != second for first, second in pairwise(seen[::4]))
