"""The attention back-ends: one result, by definition; which of them runs where; what they keep out of memory."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from titan_model import Decoder, DecoderConfig, build
from titan_model.layers.attention_backends import AttentionCore
from titan_model.layers.masks import Mask, make_mask
from titan_model.layers.varlen_cpu import document_attention

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
BACK_ENDS = ["sdpa", "flex", "varlen"]
CONFIG = DecoderConfig(vocab_size=9, dim=32, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=8, max_seq_len=512)

# A row of documents: ids need not be in order, nor different from one another, as long as neighbors differ.
ROWS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def normal(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**options)


def mask_for(attention: str, ids: Tensor, like: Tensor | None = None) -> Mask:
    config = replace(CONFIG, attention=attention)
    mask = make_mask(config, ids, torch.empty(*ids.shape, 1) if like is None else like)
    assert mask is not None
    return mask


def by_definition(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """Attend query by query over the keys of its own run of ids, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    share = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        begin = 0
        for i in range(q.shape[2]):
            if i and ids[b, i] != ids[b, i - 1]:
                begin = i
            for h in range(q.shape[1]):
                keys, values = (x[b, h // share, begin : i + 1] for x in (k, v))
                out[b, h, i] = (keys @ q[b, h, i] / math.sqrt(q.shape[3])).softmax(0) @ values
    return out


@pytest.mark.parametrize(
    "attention", [pytest.param(kind, marks=pytest.mark.slow) if kind == "flex" else kind for kind in BACK_ENDS]
)
@settings(deadline=None, max_examples=25)
@given(row=ROWS, heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]))
def test_documents_by_definition(attention: str, row: list[int], heads: tuple[int, int]) -> None:
    ids = torch.tensor([row, row[::-1]])
    q, k, v = (normal(2, n, len(row), 8, seed=i) for i, n in enumerate((heads[0], heads[1], heads[1])))
    with torch.no_grad():
        out = AttentionCore()(q, k, v, mask_for(attention, ids))
    torch.testing.assert_close(out.double(), by_definition(q, k, v, ids), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(1, 699), max_size=6), length=st.sampled_from([127, 128, 129, 300, 700]))
def test_flex_blocks_are_those_that_torch_finds_by_trying_every_pair(cuts: set[int], length: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    ids = torch.zeros(2, length, dtype=torch.int64)
    ids[0, [cut for cut in cuts if cut < length]] = 1
    ids = ids.cumsum(1)
    with torch.no_grad():
        ours = mask_for("flex", ids).blocks
    assert ours is not None
    assert ours.full_kv_num_blocks is not None
    theirs = create_block_mask(ours.mask_mod, 2, None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(ours.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert ours.shape == theirs.shape


@settings(deadline=None, max_examples=10)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_gradients_of_documents_are_those_of_their_function(lengths: list[int]) -> None:
    total = sum(lengths)
    boundaries = torch.tensor([0, *lengths, 0, 0]).cumsum(0).int()  # the end may be repeated
    inputs = [normal(total, n, 3, seed=n, dtype=torch.float64).requires_grad_() for n in (4, 2, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: document_attention(q, k, v, boundaries, total), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3])
def test_the_document_operators_are_sound(window: int) -> None:
    boundaries = torch.tensor([0, 3, 7], dtype=torch.int32)
    inputs = [normal(7, n, 8, seed=n).requires_grad_() for n in (4, 2, 2)]
    torch.library.opcheck(torch.ops.titan_model.document_attention, (*inputs, boundaries, window))


def test_a_document_is_computed_as_if_it_were_alone() -> None:
    # Not just close: the same kernel sums the same numbers in the same order.
    lengths = [40, 1, 87]
    q, k, v = (normal(1, n, 128, 16, seed=n) for n in (4, 2, 2))
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    together = AttentionCore()(q, k, v, mask_for("varlen", ids))
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    alone = torch.cat([AttentionCore()(*part, None) for part in parts], dim=2)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("document_ids", [None, torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])])
@pytest.mark.parametrize("attention", ["auto", *BACK_ENDS])
def test_the_mask_keeps_the_ids_as_they_came(attention: str, document_ids: Tensor | None) -> None:
    with torch.no_grad():
        mask = make_mask(replace(CONFIG, attention=attention), document_ids, torch.empty(2, 4, 32))
    if document_ids is None and attention in ("auto", "sdpa"):
        assert mask is None
        return
    assert mask is not None
    prepared = {"sdpa": mask.allowed, "flex": mask.blocks, "varlen": mask.boundaries}
    wanted = "varlen" if attention == "auto" else attention
    assert [name for name, value in prepared.items() if value is not None] == [wanted]
    if document_ids is not None:
        assert mask.document_ids is document_ids


@pytest.mark.parametrize(
    ("attention", "device", "message"),
    [
        ("flex", "cpu", "no backward on the CPU: set attention to 'auto' to train"),
        ("flex", "meta", "runs on CUDA and CPU, not on meta: set attention to 'auto'"),
        ("varlen", "meta", "runs on CUDA and CPU, not on meta: set attention to 'auto'"),
    ],
)
def test_a_back_end_where_it_cannot_run_is_refused(
    random_decoder: Callable[..., Decoder], attention: str, device: str, message: str
) -> None:
    model = random_decoder(attention=attention).to(device)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 4, dtype=torch.int64, device=device))


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({}, torch.float32, "support bfloat16 and float16, not torch.float32; set attention to 'auto'"),
        ({"head_dim": 12}, torch.bfloat16, "multiple of 8 up to 256, not 12; set attention to 'auto'"),
        ({"head_dim": 512}, torch.float16, "multiple of 8 up to 256, not 512; set attention to 'auto'"),
    ],
)
def test_what_cuda_kernels_do_not_take_is_refused_or_gone_around(
    changes: dict[str, int], dtype: torch.dtype, message: str
) -> None:
    # A fake tensor stands in for the device: the choice is made before anything is computed.
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode() as mode:
        x = FakeTensor(mode, torch.empty(1, 4, 32, dtype=dtype, device="meta"), torch.device("cuda"))
    from titan_model.layers.masks import _backend

    config = replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        _backend(replace(config, attention="varlen"), x)
    assert _backend(config, x) == "flex"


def test_a_forward_on_meta_gives_shapes() -> None:
    tokens = torch.zeros(2, 6, dtype=torch.int64, device="meta")
    assert build(CONFIG, "meta")(tokens, document_ids=tokens).shape == (2, 6, 9)


def test_on_other_devices_the_default_is_a_mask() -> None:
    tokens = torch.zeros(2, 6, dtype=torch.int64, device="meta")
    mask = make_mask(CONFIG, tokens, torch.empty(2, 6, 32, device="meta"))
    assert mask is not None
    assert mask.allowed is not None


def test_a_forward_with_documents_can_be_traced_with_fake_tensors() -> None:
    model = build(CONFIG, "cpu")
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    graph = make_fx(lambda t, d: model(t, document_ids=d), tracing_mode="fake", _allow_non_fake_inputs=True)(
        tokens, tokens
    )
    assert any("document_attention" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "documents", [pytest.param(False, marks=pytest.mark.nightly), True], ids=["regular", "documents"]
)
@pytest.mark.parametrize("attention", BACK_ENDS)
def test_a_block_compiles_whole(random_decoder: Callable[..., Decoder], attention: str, documents: bool) -> None:
    eager, compiled = random_decoder(attention=attention), random_decoder(attention=attention)
    torch._dynamo.reset()
    compiled.layers["0"].compile(backend="aot_eager", fullgraph=True)
    tokens = torch.arange(60).view(2, 30) % 37
    differentiate = attention != "flex"
    for seed in range(3):  # other documents, and another number of them, must not break the graph
        ids = torch.randint(0, 2, (2, 30), generator=torch.Generator().manual_seed(seed)).cumsum(1)
        with torch.set_grad_enabled(differentiate):
            ours, theirs = (m(tokens, document_ids=ids if documents else None) for m in (compiled, eager))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        if differentiate:
            ours.square().sum().backward()
            theirs.square().sum().backward()
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        if differentiate:
            assert float((one.grad - other.grad).norm()) <= 1e-5 * float(other.grad.norm())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_a_checkpointed_block_has_the_same_gradients(
    random_decoder: Callable[..., Decoder], attention: str, reentrant: bool
) -> None:
    block = random_decoder(attention=attention).layers["0"]
    mask = mask_for(attention, torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]]))
    angles = torch.arange(8.0)[None, :, None, None] * torch.ones(4)
    rope = (angles.cos(), angles.sin())
    gradients = []
    for kept in (True, False):
        x = normal(1, 8, 32).requires_grad_()
        block.zero_grad()
        out = block(x, rope, mask) if kept else checkpoint(block, x, rope, mask, use_reentrant=reentrant)
        out.square().sum().backward()
        gradients.append([parameter.grad for parameter in (x, *block.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert torch.equal(one, other)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Return a mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_a_mask_comes_through_the_casting_of_fsdp(
    random_decoder: Callable[..., Decoder], attention: str, mesh: DeviceMesh
) -> None:
    tokens = torch.arange(20).view(2, 10)
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2], [0] * 10])
    model = random_decoder(attention=attention)
    expected = random_decoder(attention=attention).bfloat16()(tokens, document_ids=ids)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
    for unit in (*model.layers.values(), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    out = model(tokens, document_ids=ids)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0, atol=0.2)  # the rotary angles are cast too, in blocks
    out.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("case", ["causal", "documents", "allowed", "one query"])
def test_keys_and_values_are_not_expanded(case: str) -> None:
    length, width = 256, 64
    k, v = normal(1, 1, length, width), normal(1, 1, length, width, seed=1)
    q = normal(1, 16, 1 if case == "one query" else length, width, seed=2)
    ids = torch.zeros(1, length, dtype=torch.int64)
    mask = {
        "causal": None,
        "documents": mask_for("varlen", ids),
        "allowed": mask_for("sdpa", ids),
        "one query": Mask(allowed=torch.ones(1, 1, 1, length, dtype=torch.bool)),
    }[case]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        AttentionCore()(q, k, v, mask)
    kernels = [event for event in profile.key_averages(group_by_input_shape=True) if "flash" in event.key]
    assert kernels  # of 16 query heads and one key head
    assert all(event.input_shapes[1] == event.input_shapes[2] == [1, 1, length, width] for event in kernels)
    if case == "one query":  # nor need the kernel know of groups
        assert all(event.input_shapes[0] == [1, 1, 16, width] for event in kernels)


@cuda
@pytest.mark.parametrize(("attention", "dtype"), [("auto", "bfloat16"), ("auto", "float32"), ("varlen", "float16")])
def test_cuda_computes_what_the_cpu_computes(attention: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    ids = torch.tensor([[0] * 100 + [1] * 200 + [2] * 3, [0] * 303])
    inputs = [normal(2, n, 303, 64, seed=i).to(kind).float() for i, n in enumerate((4, 2, 2))]
    results = []
    for device, choice, to in (("cpu", "sdpa", torch.float32), ("cuda", attention, kind)):
        q, k, v = (x.to(device, to).requires_grad_() for x in inputs)
        like = torch.empty(2, 303, 1, device=device, dtype=to)
        out = AttentionCore()(q, k, v, mask_for(choice, ids.to(device), like))
        out.float().square().sum().backward()
        results.append([x.float().cpu() for x in (out, q.grad, k.grad, v.grad) if x is not None])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2 if dtype != "float32" else 2e-3)


@pytest.mark.parametrize(
    "attention", [pytest.param(kind, marks=pytest.mark.slow) if kind == "flex" else kind for kind in BACK_ENDS]
)
@settings(deadline=None, max_examples=10)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), window=st.integers(1, 12))
def test_a_window_ends_what_a_query_attends_to(attention: str, lengths: list[int], window: int) -> None:
    total = sum(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    q, k, v = (torch.randn(1, heads, total, 8) for heads in (4, 2, 2))
    places = torch.arange(total)
    distance = places[:, None] - places[None, :]
    seen = (distance >= 0) & (distance < window) & (ids[0][:, None] == ids[0][None, :])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    with torch.no_grad():
        mask = make_mask(replace(CONFIG, attention=attention), ids, torch.empty(1, total, 32), window)
        torch.testing.assert_close(AttentionCore()(q, k, v, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_gradients_within_windows_are_those_of_a_mask(attention: str) -> None:
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([9, 2, 5]))[None]
    distance = torch.arange(16)[:, None] - torch.arange(16)[None, :]
    seen = (distance >= 0) & (distance < 4) & (ids[0][:, None] == ids[0][None, :])
    inputs = [torch.randn(1, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2)]
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=seen, enable_gqa=True)
    mask = make_mask(replace(CONFIG, attention=attention), ids, torch.empty(1, 16, 32), 4)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), inputs)
    found = torch.autograd.grad((AttentionCore()(*inputs, mask) * weight).sum(), inputs)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_blocks_outside_the_window_are_skipped() -> None:
    with torch.no_grad():
        mask = make_mask(replace(CONFIG, attention="flex"), None, torch.empty(1, 1024, 32), 200)
    assert mask is not None
    assert mask.blocks is not None
    # Of 8 blocks of 128 each sees itself, the one before, and the one before that from its first 72 queries.
    assert mask.blocks.kv_num_blocks.tolist() == [[[1, 2, 3, 3, 3, 3, 3, 3]]]
    assert mask.blocks.full_kv_num_blocks.tolist() == [[[0] * 8]]
