"""The shape of a decoder, as frozen dataclasses that validate themselves.

Everything else in the package takes a `DecoderConfig`: `presets` and `convert.huggingface_config` make them, `decoder`
builds a model from one, `cost` and `plan` describe that model without building it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

NormKind = Literal["rmsnorm", "fused_rmsnorm", "layernorm", "np_layernorm"]
AttentionKind = Literal["auto", "sdpa", "flex", "varlen"]
ScoreKind = Literal["softmax", "sigmoid"]

_GROUPED_MULTIPLE = 8  # torch's grouped matrix products need rows of a multiple of 16 bytes: 8 elements in bf16


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's scaling of rotary wavelengths out_of_range the context of pre-training.

    Wavelengths below `original_context / high_freq_factor` are unchanged, those above
    `original_context / low_freq_factor` are multiplied by `factor`, and those between are interpolated. Source: the
    reference code released with Llama 3.1.

    Attributes:
        factor: Multiplies the longest wavelengths.
        low_freq_factor: Wavelengths above `original_context / low_freq_factor` are scaled by all of `factor`.
        high_freq_factor: Wavelengths below `original_context / high_freq_factor` are unchanged.
        original_context: Context length of pre-training, in tokens.

    Raises:
        ValueError: If the values are out of range or contradict each other.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor and self.original_context >= 1):
            raise ValueError(
                "rope scaling: factor must be at least 1, 0 < low_freq_factor < high_freq_factor, and original_context "
                f"at least 1; got {self}"
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Shape of a mixture of experts that replaces the feed-forward of a block: top-k routing, no token dropped.

    Attributes:
        n_experts: Experts per block (`E`).
        top_k: Experts that each token is routed to.
        ffn_dim: Inner width of one expert; must be a multiple of 8, and so must the model's `dim`.
        shared_ffn_dim: Inner width of the shared expert that processes every token; 0 disables it.
        dense_layers: Indices of the blocks that keep a dense feed-forward.
        score: How router logits become scores.
        normalize_top_k: Whether the scores of the chosen experts are scaled to sum to one.
        route_scale: Factor on the scores of the chosen experts, after that normalization.
        balance_loss: Coefficient of the load-balancing loss (Switch Transformer, Fedus et al. 2021, arXiv:2101.03961),
            computed over each sequence in each block. Under a perfectly even load it adds this coefficient per token.
            If set, call `set_num_target_tokens` in each step. 0 disables it.
        balance_bias_rate: How much `balance_experts` changes each expert's selection bias per step (loss-free
            balancing, Wang et al. 2024, arXiv:2408.15664). 0 disables the bias.

    Raises:
        ValueError: If values are out of range or contradict each other; the message lists all of them.
    """

    n_experts: int
    top_k: int
    ffn_dim: int
    shared_ffn_dim: int = 0
    dense_layers: tuple[int, ...] = ()
    score: ScoreKind = "softmax"
    normalize_top_k: bool = True
    route_scale: float = 1.0
    balance_loss: float = 0.0
    balance_bias_rate: float = 0.0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {getattr(self, name)}, must be at least 1"
            for name in ("n_experts", "top_k", "ffn_dim")
            if getattr(self, name) < 1
        ]
        if self.ffn_dim >= 1 and self.ffn_dim % _GROUPED_MULTIPLE:
            wrong.append(
                f"ffn_dim {self.ffn_dim} is not a multiple of {_GROUPED_MULTIPLE} "
                "(required by torch's grouped matrix products)"
            )
        if self.top_k > self.n_experts >= 1:
            wrong.append(f"top_k {self.top_k} is greater than n_experts {self.n_experts}")
        wrong += [
            f"{name} is {getattr(self, name)}, must not be negative"
            for name in ("shared_ffn_dim", "balance_loss", "balance_bias_rate")
            if not getattr(self, name) >= 0
        ]
        if not self.route_scale > 0:
            wrong.append(f"route_scale is {self.route_scale}, must be positive")
        if self.score not in get_args(ScoreKind):
            wrong.append(f"score is {self.score!r}, must be one of {', '.join(get_args(ScoreKind))}")
        if wrong:
            raise ValueError("moe config: " + "; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder-only transformer.

    Attributes:
        vocab_size: Number of token ids (`V`).
        dim: Width of the residual stream (`D`).
        n_layers: Number of blocks.
        n_heads: Query heads (`H`).
        n_kv_heads: Key/value heads (`Hkv`); fewer than `n_heads` means grouped-query attention.
        head_dim: Width of one head (`Dh`), or None for `dim / n_heads`. `attention_head_dim` gives the resolved value.
        ffn_dim: Inner width of the SwiGLU feed-forward (Hugging Face: `intermediate_size`).
        moe: Mixture of experts in place of the feed-forward, or None.
        max_seq_len: Longest sequence the model is designed for, in tokens.
        norm: Kind of the norms: `rmsnorm`; `fused_rmsnorm`, the same in one kernel; `layernorm` with weight and bias;
            `np_layernorm`, LayerNorm without parameters (OLMo, Groeneveld et al. 2024).
        norm_eps: Added to the mean square or the variance in every norm.
        qk_norm: Whether each head's queries and keys are normalized by an RMSNorm (Qwen3).
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: Llama 3.1's long-context scaling, or None.
        tied_embeddings: Whether the head shares the embedding's weight.
        attention: Attention back-end; `auto` chooses the fastest one that the device supports.
        init_std: Standard deviation of the initial weights.

    Raises:
        ValueError: If values are out of range or contradict each other; the message lists all of them.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int | None = None
    ffn_dim: int
    moe: MoEConfig | None = None
    max_seq_len: int
    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    attention: AttentionKind = "auto"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len"]
        if self.head_dim is not None:
            sizes.append("head_dim")
        wrong = [f"{name} is {getattr(self, name)}, must be at least 1" for name in sizes if getattr(self, name) < 1]
        wrong += [
            f"{name} is {getattr(self, name)}, must be positive"
            for name in ("norm_eps", "rope_theta", "init_std")
            if not getattr(self, name) > 0
        ]
        for name, kinds in (("norm", get_args(NormKind)), ("attention", get_args(AttentionKind))):
            if getattr(self, name) not in kinds:
                wrong.append(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(kinds)}")
        wrong += self._head_errors() + self._moe_errors()
        if wrong:
            raise ValueError("model config: " + "; ".join(wrong))

    def _head_errors(self) -> list[str]:
        wrong = []
        if self.dim >= 1 and self.n_heads >= 1:
            if self.head_dim is None and self.dim % self.n_heads:
                wrong.append(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
            elif self.attention_head_dim % 2:
                name = "dim / n_heads" if self.head_dim is None else "head_dim"
                wrong.append(f"{name} is {self.attention_head_dim}; rotary embeddings need an even number")
        if self.n_heads >= 1 and self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads:
            wrong.append(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        return wrong

    def _moe_errors(self) -> list[str]:
        if self.moe is None:
            return []
        wrong = []
        if self.dim >= 1 and self.dim % _GROUPED_MULTIPLE:
            wrong.append(f"dim {self.dim} is not a multiple of {_GROUPED_MULTIPLE}, which moe requires")
        out_of_range = [i for i in self.moe.dense_layers if not 0 <= i < self.n_layers]
        if out_of_range:
            wrong.append(f"moe.dense_layers contains {out_of_range}, but the layers are 0 to {self.n_layers - 1}")
        return wrong

    @property
    def attention_head_dim(self) -> int:
        """Width of one head (`Dh`)."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    def has_experts(self, layer: int) -> bool:
        """Return whether block number `layer` has a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers
