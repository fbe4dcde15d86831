"""What a position may see: nothing later, nothing of another document, nothing of another row, on every back-end."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from titan_model import Decoder, DynamicScaling, build
from titan_model.layers.attention import Attention

# FlexAttention has no backward on the CPU: its gradients are tested on CUDA.
BACK_ENDS = ["auto", "sdpa", "flex", "varlen"]
DIFFERENTIABLE = ["auto", "sdpa", "varlen"]
LENGTHS = st.lists(st.integers(1, 12), min_size=3, max_size=3)


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 37, shape, generator=torch.Generator().manual_seed(seed))


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return positions and document ids `[1, S]` of documents that follow one another in a row."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    document_ids = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return positions, document_ids


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), seq_len=st.integers(2, 20))
def test_a_changed_token_changes_no_earlier_logits(
    random_decoder: Callable[..., Decoder], data: st.DataObject, seq_len: int
) -> None:
    at = data.draw(st.integers(0, seq_len - 1))
    model, tokens = random_decoder(), random_tokens(2, seq_len)
    changed = tokens.clone()
    changed[0, at] = (changed[0, at] + 1) % 37
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert close(before[:, :at], after[:, :at])
    assert close(before[1], after[1])  # nor another row
    for later in range(at, seq_len):
        assert not close(before[0, later], after[0, later])


@pytest.mark.parametrize(
    "attention", [pytest.param(kind, marks=pytest.mark.slow) if kind == "flex" else kind for kind in BACK_ENDS]
)
@settings(deadline=None, max_examples=15)
@given(lengths=LENGTHS)
def test_packed_documents_get_the_logits_they_have_alone(
    random_decoder: Callable[..., Decoder], attention: str, lengths: list[int]
) -> None:
    plain, model = random_decoder(), random_decoder(attention=attention)
    documents = [random_tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    positions, document_ids = packed(lengths)
    with torch.no_grad():
        together = model(torch.cat(documents, dim=1), positions=positions, document_ids=document_ids)
        for logits, alone in zip(together.split(lengths, dim=1), documents, strict=True):
            assert close(logits, plain(alone))


@pytest.mark.parametrize("attention", DIFFERENTIABLE)
def test_packed_documents_give_the_gradients_they_give_alone(
    random_decoder: Callable[..., Decoder], attention: str
) -> None:
    packs = [[5, 1, 9], [2, 12, 1]]
    rows = [[random_tokens(1, n, seed=10 * i + n) for n in lengths] for i, lengths in enumerate(packs)]
    weights = torch.randn(2, 15, 37, generator=torch.Generator().manual_seed(1))
    together, apart = random_decoder(attention=attention), random_decoder()

    positions, document_ids = (torch.cat(parts) for parts in zip(*map(packed, packs), strict=True))
    tokens = torch.cat([torch.cat(row, dim=1) for row in rows])
    (together(tokens, positions=positions, document_ids=document_ids) * weights).sum().backward()
    for row, lengths, row_weights in zip(rows, packs, weights, strict=True):
        for alone, w in zip(row, row_weights.split(lengths), strict=True):
            (apart(alone)[0] * w).sum().backward()

    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=5e-6 * float(other.grad.abs().max()), msg=name)


@pytest.mark.parametrize("attention", BACK_ENDS)
def test_each_row_has_its_own_documents(random_decoder: Callable[..., Decoder], attention: str) -> None:
    model, tokens = random_decoder(attention=attention), random_tokens(2, 12)
    rows = [packed([3, 4, 5]), packed([7, 1, 4])]
    positions, document_ids = (torch.cat(parts) for parts in zip(*rows, strict=True))
    with torch.no_grad():
        both = model(tokens, positions=positions, document_ids=document_ids)
        for i, (row_positions, row_ids) in enumerate(rows):
            alone = model(tokens[i : i + 1], positions=row_positions, document_ids=row_ids)
            assert close(both[i : i + 1], alone)


@pytest.mark.parametrize("attention", BACK_ENDS)
def test_without_document_ids_the_row_is_one_document(random_decoder: Callable[..., Decoder], attention: str) -> None:
    model, tokens = random_decoder(attention=attention), random_tokens(1, 12)
    positions, document_ids = packed([4, 4, 4])
    with torch.no_grad():
        whole = model(tokens)
        assert close(whole, random_decoder()(tokens))
        assert close(whole, model(tokens, document_ids=torch.full_like(tokens, 9)))
        # Both halves of the packing matter: the mask, and the positions that restart.
        assert not close(whole, model(tokens, document_ids=document_ids))
        assert not close(whole, model(tokens, positions=positions))


@pytest.mark.parametrize("with_documents", [False, True])
def test_no_positions_count_from_zero(random_decoder: Callable[..., Decoder], with_documents: bool) -> None:
    model, tokens = random_decoder(), random_tokens(3, 10)
    document_ids = packed([2, 3, 5])[1].expand(3, -1) if with_documents else None
    positions = torch.arange(10).expand(3, 10)
    with torch.no_grad():
        assert torch.equal(model(tokens, document_ids=document_ids), model(tokens, positions, document_ids))
        # A shift of all positions changes nothing: only distances matter.
        assert close(model(tokens, document_ids=document_ids), model(tokens, positions + 50, document_ids))


@pytest.mark.parametrize("attention", BACK_ENDS)
def test_documents_of_another_shape_are_refused(random_decoder: Callable[..., Decoder], attention: str) -> None:
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"document_ids: shape \[1, 8\] differs from that of tokens, \[2, 8\]"),
    ):
        random_decoder(attention=attention)(random_tokens(2, 8), document_ids=torch.zeros(1, 8, dtype=torch.int64))


def test_some_of_the_heads_give_their_share_of_the_sum(random_decoder: Callable[..., Decoder]) -> None:
    # What tensor parallelism relies on: rows of q, k, v and columns of o, taken head by head, add up.
    model = random_decoder()
    whole = model.layers["0"].attn
    assert isinstance(whole, Attention)
    x = torch.randn(2, 9, model.config.dim, generator=torch.Generator().manual_seed(5))
    angles = torch.arange(9.0)[None, :, None, None] * torch.ones(model.config.attention_head_dim // 2)
    rope = (angles.cos(), angles.sin())
    total = torch.zeros_like(x)
    for rank in range(2):
        part = build(model.config, "cpu").layers["0"].attn
        assert isinstance(part, Attention)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            dim = 1 if name == "o_proj" else 0
            weight = getattr(whole, name).weight.detach().chunk(2, dim=dim)[rank]
            getattr(part, name).weight = torch.nn.Parameter(weight)
        total += part(x, rope, None).detach()
    assert close(total, whole(x, rope, None).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_the_dtype_of_the_parameters(random_decoder: Callable[..., Decoder], dtype: torch.dtype) -> None:
    logits = random_decoder().to(dtype)(random_tokens(2, 5))
    assert logits.shape == (2, 5, 37)
    assert logits.dtype == dtype


def test_a_block_left_out_leaves_the_others_their_names(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder(n_layers=3)
    del model.layers["1"]
    assert [name for name in model.state_dict() if name.startswith("layers.1.")] == []
    assert any(name.startswith("layers.2.") for name in model.state_dict())
    assert model(random_tokens(1, 4)).shape == (1, 4, 37)


def test_there_are_no_buffers(random_decoder: Callable[..., Decoder]) -> None:
    # So that a model from the meta device needs its parameters filled in and nothing else.
    assert list(random_decoder().buffers()) == []


def test_a_scaling_by_length_knows_the_documents(random_decoder: Callable[..., Decoder]) -> None:
    model = random_decoder(rope_scaling=DynamicScaling(factor=4.0, original_context=4), rope_theta=100.0)
    documents = [random_tokens(1, n, seed=n) for n in (9, 3, 14)]
    positions, document_ids = packed([9, 3, 14])
    with torch.no_grad():
        together = model(torch.cat(documents, dim=1), positions=positions, document_ids=document_ids)
        for logits, alone in zip(together.split([9, 3, 14], dim=1), documents, strict=True):
            assert close(logits, model(alone))
