"""Attention of sequences in parts equals attention of full sequences, piece by piece and rank by rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import parallel_context as cases
from ranks import Ranks
from titan_parallel import ParallelOptions
from titan_parallel.context.blockwise import (
    add_attention,
    add_gradients,
    attend,
    document_starts,
    no_logs,
    pieces,
    wide,
)
from titan_parallel.context.flex import attend_flex
from titan_parallel.context.kernels import UNFUSED, Kernel, kernel_for
from titan_parallel.context.layout import Span, by_rank, in_order, is_balanced, spans_of, take_part

KINDS = ["allgather", "ring", "ulysses"]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]
few = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@st.composite
def packed(draw: st.DrawFn, size: int) -> tuple[tuple[int, int, int, int, int], Tensor | None]:
    """Draw sizes (rows, heads, key/value heads, length, head dim) for `size` ranks, and ids of documents or None."""
    rows, length = draw(st.integers(1, 3)), 2 * size * draw(st.integers(1, 5))
    heads = size * draw(st.integers(1, 3))
    kv_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    # Two ids only: most runs meet others of the same id once a sequence is cut.
    row = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    ids = draw(st.none() | st.lists(row, min_size=rows, max_size=rows).map(torch.tensor))
    return (rows, heads, kv_heads, length, draw(st.sampled_from([4, 8, 20]))), ids


def check_ranks(group: Ranks, kind: str, sizes: tuple[int, int, int, int, int], ids: Tensor | None) -> None:
    results = group.run(cases.attention, kind, sizes, ids, torch.float32)
    for parts, whole in zip(zip(*results, strict=True), cases.expected_attention(sizes, ids), strict=True):
        found = in_order(torch.stack(parts), 2, balanced=is_balanced(kind))
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks(ranks2: Ranks, kind: str) -> None:
    @few
    @given(packed(2))
    def check(case: tuple[tuple[int, int, int, int, int], Tensor | None]) -> None:
        check_ranks(ranks2, kind, *case)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks(ranks4: Ranks, kind: str) -> None:
    @few
    @given(packed(4))
    def check(case: tuple[tuple[int, int, int, int, int], Tensor | None]) -> None:
        check_ranks(ranks4, kind, *case)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(ranks4: Ranks, kind: str) -> None:
    sizes, ids = (2, 4, 2, 64, 8), cases.documents(2, 64, torch.Generator().manual_seed(0))
    results = ranks4.run(cases.attention, kind, sizes, ids, torch.bfloat16)
    for parts, whole in zip(zip(*results, strict=True), cases.expected_attention(sizes, ids), strict=True):
        found = in_order(torch.stack(parts), 2, balanced=is_balanced(kind))
        torch.testing.assert_close(found, whole, rtol=2e-2, atol=6e-2)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_make_the_whole(balanced: bool, dim: int) -> None:
    whole = torch.randn(24, 24)
    parts = by_rank(whole, dim, 3, balanced=balanced)
    assert torch.equal(in_order(parts, dim, balanced=balanced), whole)
    assert torch.equal(parts[1], take_part(whole, dim, 1, 3, balanced=balanced))


def test_balanced_ranks_have_equal_work() -> None:
    size, length = 4, 6
    spans = [spans_of(rank, size, length, balanced=True) for rank in range(size)]
    work = [sum(place + 1 for s in own for place in range(s.place, s.place + s.length)) for own in spans]
    assert len(set(work)) == 1


@few
@given(packed(3))
def test_pieces_are_what_the_mask_shows(case: tuple[tuple[int, int, int, int, int], Tensor | None]) -> None:
    # At once against full sequences, and against the parts of one rank after the other.
    (rows, _, _, length, _), ids = case
    starts = None if ids is None else document_starts(ids)
    expected = torch.ones(rows, 1, length, length).tril() if ids is None else cases.dense_mask(ids).float()
    for keys_in_parts in (False, True):
        seen = torch.zeros(rows, 1, length, length)
        for rank in range(3):
            queries = spans_of(rank, 3, length // 3, balanced=True)
            own = None if starts is None else take_part(starts, 1, rank, 3, balanced=True)
            order = torch.cat([torch.arange(s.place, s.place + s.length) for s in queries])
            parts = [spans_of(other, 3, length // 3, balanced=True) for other in range(3)]
            for keys in parts if keys_in_parts else [[Span(0, 0, length)]]:
                places = torch.cat([torch.arange(s.place, s.place + s.length) for s in keys])
                for piece in pieces(queries, keys, own):
                    add_piece(seen, piece, order, places)
        assert torch.equal(seen, expected)


def add_piece(seen: Tensor, piece: tuple[slice, slice, slice, bool], order: Tensor, places: Tensor) -> None:
    rows, queries, keys, causal = piece
    shown = torch.ones(len(order[queries]), len(places[keys]))
    assert shown.numel()  # a kernel is called for each piece: none is empty
    seen[rows, 0, order[queries][:, None], places[keys][None]] += shown.tril() if causal else shown


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_one_device_plays_all_ranks(device: str, dtype: torch.dtype, masked: bool) -> None:
    """What each rank computes, without the ranks: gathered keys, and keys that come around."""
    sizes, size = (2, 4, 2, 96, 16), 3
    ids = cases.documents(2, 96, torch.Generator().manual_seed(0)) if masked else None
    expected = cases.expected_attention(sizes, ids)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 8e-2}
    q, k, v, grad = (x.to(device, dtype) for x in cases.inputs(sizes))
    for by_ring in (False, True):
        out, dq, dk, dv = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rank in range(size):
            queries = spans_of(rank, size, 96 // size, balanced=True)
            here = torch.cat([torch.arange(s.place, s.place + s.length, device=device) for s in queries])
            starts = None if ids is None else document_starts(ids)[:, here.cpu()].to(device)
            play = play_ring if by_ring else play_gather
            results = play(q[:, :, here], k, v, grad[:, :, here], queries, starts, size)
            out[:, :, here], dq[:, :, here] = results[0].to(dtype), results[1].to(dtype)
            dk, dv = dk + results[2], dv + results[3]
        for found, whole in zip((out, dq, dk, dv), expected, strict=True):
            torch.testing.assert_close(found.cpu().float(), whole, **tolerance)


def play_gather(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, queries: list[Span], starts: Tensor | None, size: int
) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    if starts is not None and q.is_cuda:
        places = torch.cat([torch.arange(s.place, s.place + s.length, device=q.device) for s in queries])
        out = attend_flex(*leaves, places, starts, q.shape[-1] ** -0.5)
    else:
        out = attend(*leaves, starts, [s.place for s in queries], q.shape[-1] ** -0.5)[0]
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def play_ring(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, queries: list[Span], starts: Tensor | None, size: int
) -> tuple[Tensor, ...]:
    scale, length = q.shape[-1] ** -0.5, q.shape[2]
    out, logs, gradients = wide(q), no_logs(q), (wide(q), wide(k), wide(v))
    parts = [spans_of(rank, size, length, balanced=True) for rank in range(size)]
    spans = [[Span(s.place, s.place, s.length) for s in part] for part in parts]  # where they are in the full sequence
    for keys in spans:
        add_attention(pieces(queries, keys, starts), (q, k, v), scale, (out, logs))
    for keys in spans:
        add_gradients(pieces(queries, keys, starts), grad, (q, k, v), scale, (out.to(q.dtype), logs), gradients)
    return out, *gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 8), (torch.float32, 20), (torch.bfloat16, 64), (torch.float64, 8)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_kernels_agree_with_the_plain_one(device: str, dtype: torch.dtype, width: int, causal: bool) -> None:
    length = 37  # of no kernel's liking
    q, k, v, grad = (x.to(device, dtype) for x in cases.inputs((2, 6, 2, length, width)))
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    found, expected = (run_kernel(kernel, q, k, v, grad, causal) for kernel in (kernel_for(q), UNFUSED))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


def run_kernel(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool) -> tuple[Tensor, ...]:
    result = kernel.forward((q, k, v), causal=causal, scale=0.3)
    return *result, *kernel.backward(grad, (q, k, v), result, causal=causal, scale=0.3)


def test_what_no_kernel_takes_is_computed_plainly() -> None:
    assert kernel_for(torch.zeros(1, 1, 1, 8)) is not UNFUSED
    assert kernel_for(torch.zeros(1, 1, 1, 8, dtype=torch.float16)) is UNFUSED
    assert kernel_for(torch.zeros(1, 1, 1, 8, device="meta")) is UNFUSED


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("length", [384, 336])  # a multiple of blocks, and not
def test_flex_masks(length: int) -> None:
    # Its backward runs on CUDA only, where test_one_device_plays_all_ranks takes it.
    size, sizes = 2, (2, 4, 2, length, 8)
    ids = (torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.02).cumsum(1)
    q, k, v, _ = cases.inputs(sizes)
    starts, outs = document_starts(ids), []
    for rank in range(size):
        queries = spans_of(rank, size, length // size, balanced=True)
        places = torch.cat([torch.arange(s.place, s.place + s.length) for s in queries])
        outs.append(attend_flex(q[:, :, places], k, v, places, starts[:, places], 8**-0.5))
    whole = in_order(torch.stack(outs), 2, balanced=True)
    torch.testing.assert_close(whole, cases.plain_attention(q, k, v, ids), rtol=1e-5, atol=1e-5)


SIZES = (2, 8, 2, 32, 4)  # rows, heads, key/value heads, length, head dim


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_traffic(ranks4: Ranks, kind: str, masked: bool) -> None:
    rows, heads, kv_heads, length, width = SIZES
    part = rows * length // 4 * width * 4  # bytes of one head on one rank
    pair = 2 * kv_heads * part
    steps = 3  # ranks that keys and values are yet to reach
    exchanged = [(heads + 2 * 4) * part, heads * part]  # two key/value heads become four, one for each rank
    theory = {
        "allgather": ({"all_gather_into_tensor": [pair]}, {"reduce_scatter_tensor": [4 * pair]}),
        # Backward sends keys and values once more, and their gradients: each but to the rank that they are of.
        "ring": ({"batch_isend_irecv": [pair] * steps}, {"batch_isend_irecv": [pair] * 2 * steps}),
        "ulysses": ({"all_to_all_single": exchanged}, {"all_to_all_single": exchanged[::-1]}),
    }
    expected_forward, expected_backward = theory[kind]
    if masked:  # the ids of the documents
        gathers = expected_forward.get("all_gather_into_tensor", [])
        expected_forward["all_gather_into_tensor"] = [rows * length // 4 * 8, *gathers]
    for forward, backward in ranks4.run(cases.traffic, kind, SIZES, masked):
        assert forward == expected_forward
        assert backward == expected_backward


@pytest.mark.parametrize(("checkpointing", "times"), [("none", 3), ("selective", 3), ("full", 4)])
def test_checkpointing_runs_the_ring_again_only_if_it_keeps_nothing(
    ranks2: Ranks, checkpointing: str, times: int
) -> None:
    # Two blocks and one step around: forward once, backward twice, and forward once more where all is recomputed.
    options = ParallelOptions(context="ring", activation_checkpointing=checkpointing)
    assert ranks2.run(cases.ring_steps, options) == [2 * times] * 2
