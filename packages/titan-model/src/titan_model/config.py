"""What a decoder is made of, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary wavelengths beyond the context of pre-training.

    Wavelengths below `original_context / high_freq_factor` stay, those above `original_context / low_freq_factor`
    grow by `factor`, and those between are blended. Source: the reference code released with Llama 3.1.

    Attributes:
        factor: How much the longest wavelengths grow.
        low_freq_factor: Sets the wavelength (in units of the original context) above which all of `factor` applies.
        high_freq_factor: Sets the wavelength below which nothing changes.
        original_context: Context length of pre-training, in tokens.

    Raises:
        ValueError: If the wavelengths do not fit together.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor and self.original_context >= 1):
            raise ValueError(f"rope scaling: needs factor >= 1, 0 < low < high, a context of at least 1, not {self}")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder-only transformer of the Llama kind.

    Attributes:
        vocab_size: Rows of the embedding and of the head.
        dim: Width of the residual stream (`D`).
        n_layers: Number of blocks.
        n_heads: Query heads (`H`).
        n_kv_heads: Key/value heads (`Hkv`); fewer than `n_heads` is grouped-query attention.
        ffn_dim: Inner width of the SwiGLU feed-forward.
        max_seq_len: Longest sequence the model is meant for, in tokens.
        norm_eps: Added to the mean square in every RMSNorm.
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: Llama 3.1's long-context scaling, or None.
        tied_embeddings: Whether the head shares the embedding's weight.
        init_std: Standard deviation of the initial weights.

    Raises:
        ValueError: If the numbers do not fit together; the message lists every misfit.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len")
        wrong = [f"{name} is {getattr(self, name)}, must be at least 1" for name in sizes if getattr(self, name) < 1]
        if self.dim >= 1 and self.n_heads >= 1:
            if self.dim % self.n_heads:
                wrong.append(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            elif self.head_dim % 2:
                wrong.append(f"dim / n_heads is {self.head_dim}; rotary embeddings need an even number")
        if self.n_heads >= 1 and self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads:
            wrong.append(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if wrong:
            raise ValueError("model config: " + "; ".join(wrong))

    @property
    def head_dim(self) -> int:
        """Width of one head (`Dh`)."""
        return self.dim // self.n_heads
