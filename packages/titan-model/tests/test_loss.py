"""The loss against the formula in double precision: any chunks, z-loss, sources, vocabulary split over ranks."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ranks import Ranks
from titan_model import Decoder, LossSums, linear_cross_entropy


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    labels: Tensor
    sources: Tensor


def make_case(rows: int = 3, length: int = 7, vocab: int = 11, seed: int = 0, scored: float = 0.7) -> Case:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) > scored] = -100
    return Case(
        torch.randn(rows, length, 6, generator=generator).requires_grad_(),
        torch.randn(vocab, 6, generator=generator).requires_grad_(),
        labels,
        torch.randint(0, 3, (rows,), generator=generator),
    )


def by_formula(case: Case, z_loss: float) -> LossSums:
    """All logits at once, in double precision, with torch's own gradients."""
    logits = case.x.double() @ case.weight.double().t()
    log_sum = logits.logsumexp(-1)
    scored = case.labels != -100
    each = (log_sum - logits.gather(-1, case.labels.clamp(min=0)[..., None]).squeeze(-1)) * scored
    z = z_loss * (log_sum.square() * scored).sum()
    by_source = [(each[case.sources == i].sum(), scored[case.sources == i].sum()) for i in range(3)]
    ce, count = (torch.stack(column) for column in zip(*by_source, strict=True))
    return LossSums(each.sum() + z, ce.detach(), z.detach(), count)


def gradients(loss: Tensor, case: Case, scale: float = 1.0) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss * scale, (case.x, case.weight))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 9),
    vocab=st.integers(1, 13),
    seed=st.integers(0, 1000),
    scored=st.sampled_from([0.0, 0.6, 1.0]),
    z_loss=st.sampled_from([0.0, 0.3]),
    chunk=st.none() | st.integers(1, 12),
    scale=st.sampled_from([1.0, 0.01]),
)
def test_by_formula(
    rows: int, length: int, vocab: int, seed: int, scored: float, z_loss: float, chunk: int | None, scale: float
) -> None:
    case = make_case(rows, length, vocab, seed, scored)
    ours = linear_cross_entropy(*case[:3], z_loss=z_loss, source_ids=case.sources, n_sources=3, chunk_tokens=chunk)
    expected = by_formula(case, z_loss)
    for name in LossSums._fields:
        torch.testing.assert_close(
            getattr(ours, name), getattr(expected, name), rtol=1e-5, atol=1e-5, check_dtype=False, msg=name
        )
    assert ours.total.dtype == torch.float32
    assert not ours.cross_entropy.requires_grad
    for got, want in zip(gradients(ours.total, case, scale), gradients(expected.total, case, scale), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_far_logits_do_not_overflow() -> None:
    x = torch.tensor([[[1e4, 0.0]]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(x, weight, torch.tensor([[1]])).total
    assert loss.item() == 2e4
    loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[2.0, 0.0]]]


def test_half_precision_sums_in_fp32() -> None:
    case = make_case(4, 64, 50)
    half = Case(
        case.x.detach().bfloat16().requires_grad_(), case.weight.detach().bfloat16().requires_grad_(), *case[2:]
    )
    same_numbers = Case(
        half.x.detach().float().requires_grad_(), half.weight.detach().float().requires_grad_(), *half[2:]
    )
    ours = linear_cross_entropy(*half[:3], chunk_tokens=1)
    expected = by_formula(same_numbers, 0.0)
    # Logits are rounded to bf16 (8 bits) one by one; their errors must not add up over tokens or chunks.
    assert ours.total.item() == pytest.approx(expected.total.item(), rel=2e-3)
    for got, want in zip(gradients(ours.total, half), gradients(expected.total, same_numbers), strict=True):
        assert got.dtype == torch.bfloat16
        assert float((got.float() - want).norm() / want.norm()) < 6e-3


def test_without_gradient_none_is_computed() -> None:
    case = make_case()
    with torch.no_grad():
        quiet = linear_cross_entropy(*case[:3])
    assert not quiet.total.requires_grad
    assert quiet.total.item() == linear_cross_entropy(*case[:3]).total.item()


def test_second_backward_is_refused() -> None:
    case = make_case()
    loss = linear_cross_entropy(*case[:3]).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()


def test_frozen_head_or_body() -> None:
    case = make_case()
    both = gradients(linear_cross_entropy(*case[:3]).total, case)
    only_x = linear_cross_entropy(case.x, case.weight.detach(), case.labels).total
    only_weight = linear_cross_entropy(case.x.detach(), case.weight, case.labels).total
    torch.testing.assert_close(torch.autograd.grad(only_x, case.x)[0], both[0])
    torch.testing.assert_close(torch.autograd.grad(only_weight, case.weight)[0], both[1])


def test_decoder_gives_the_same_loss_as_its_logits(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder()
    tokens = torch.randint(0, model.config.vocab_size, (2, 9))
    labels = tokens.roll(-1, 1)
    sums = model(tokens, labels=labels, source_ids=torch.tensor([1, 0]), n_sources=2)
    logits = model(tokens)
    rows = torch.stack(
        [torch.nn.functional.cross_entropy(row, y, reduction="sum") for row, y in zip(logits, labels, strict=True)]
    )
    torch.testing.assert_close(sums.cross_entropy, rows.detach().flip(0))
    torch.testing.assert_close(sums.total, rows.sum())


def on_ranks(placement: str, z_loss: float) -> list[object]:
    case = make_case(vocab=11)  # not divisible: the last rank has fewer columns
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    weight = distribute_tensor(case.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    x = case.x
    if placement != "plain":
        layout = Shard(1) if placement == "sequence" else Replicate()
        x = distribute_tensor(case.x.detach(), mesh, [layout]).requires_grad_()
    sums = linear_cross_entropy(x, weight, case.labels, z_loss=z_loss, source_ids=case.sources, n_sources=3)
    grads = torch.autograd.grad(sums.total, (x, weight))
    assert all(not isinstance(value, DTensor) for value in sums)
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
    return [value.tolist() for value in (*sums, *whole)]


def all_placements() -> list[object]:
    return [on_ranks(placement, z) for placement in ("plain", "replicated", "sequence") for z in (0.0, 0.3)]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_vocabulary_split_over_ranks(size: int, ranks: Callable[[int], Ranks]) -> None:
    case = make_case(vocab=11)
    expected = []
    for z_loss in (0.0, 0.3):
        sums = by_formula(case, z_loss)
        expected.append([value.detach() for value in (*sums, *gradients(sums.total, case))])
    for answer in ranks(size).run(all_placements):
        for i, got in enumerate(answer):
            for value, want in zip(got, expected[i % 2], strict=True):
                torch.testing.assert_close(torch.tensor(value).double(), want.double(), rtol=1e-4, atol=1e-5)
