from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import strategies as st

from titan_model import Decoder, DecoderConfig, Llama3Scaling, build
from titan_model.config import MoEConfig, NormKind

TINY = DecoderConfig(vocab_size=37, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, max_seq_len=64)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: for models this small, several threads cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed torch's global generator, so that a test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> DecoderConfig:
    """Two layers, grouped-query attention, a prime vocabulary size."""
    return TINY


@st.composite
def small_mixtures(draw: st.DrawFn, n_layers: int) -> MoEConfig:
    n_experts = draw(st.integers(1, 5))
    return MoEConfig(
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        ffn_dim=draw(st.sampled_from([8, 24])),
        shared_ffn_dim=draw(st.sampled_from([0, 5])),
        dense_layers=tuple(draw(st.sets(st.integers(0, n_layers - 1)))),
        balance_bias_rate=draw(st.sampled_from([0.0, 0.1])),
    )


@pytest.fixture(scope="session")
def small_configs() -> st.SearchStrategy[DecoderConfig]:
    """Any config that is quick to build, with every option on and off."""

    @st.composite
    def draw_config(draw: st.DrawFn) -> DecoderConfig:
        n_kv_heads = draw(st.integers(1, 4))
        n_heads = n_kv_heads * draw(st.integers(1, 4))
        n_layers = draw(st.integers(1, 4))
        moe = draw(st.none() | small_mixtures(n_layers))
        return DecoderConfig(
            vocab_size=draw(st.integers(1, 70)),
            dim=n_heads * (draw(st.sampled_from([2, 4, 6, 10])) if moe is None else 8),
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=draw(st.sampled_from([None, 2, 6, 14])),
            ffn_dim=draw(st.integers(1, 40)),
            moe=moe,
            max_seq_len=64,
            norm=draw(st.sampled_from(get_args(NormKind))),
            qk_norm=draw(st.booleans()),
            qkv_bias=draw(st.booleans()),
            nope_layers=tuple(draw(st.sets(st.integers(0, n_layers - 1)))),
            embedding_multiplier=draw(st.sampled_from([1.0, 2.0])),
            residual_multiplier=draw(st.sampled_from([1.0, 0.5])),
            logits_scaling=draw(st.sampled_from([1.0, 4.0])),
            attention_multiplier=draw(st.none() | st.just(0.3)),
            rope_scaling=draw(st.none() | st.just(Llama3Scaling(factor=8.0))),
            tied_embeddings=draw(st.booleans()),
        )

    return draw_config()


@pytest.fixture(scope="session")
def random_decoder() -> Callable[..., Decoder]:
    """Return a function that builds a decoder with weights large enough for every part to matter."""

    def make(config: DecoderConfig = TINY, **changes: object) -> Decoder:
        model = build(replace(config, **changes), "cpu")
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms too: with ones, a norm in the wrong place would go unseen.
                shift = 1.0 if parameter.dim() == 1 else 0.0
                parameter.normal_(shift, 0.2, generator=generator)
        return model

    return make
