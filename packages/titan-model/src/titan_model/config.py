"""The shape of a decoder, as frozen dataclasses that validate themselves.

Everything else in the package takes a `DecoderConfig`: `presets` and `convert.huggingface_config` make them, `decoder`
builds a model from one, `cost` and `plan` describe that model without building it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from titan_model.rope_scalings import DynamicScaling, LongRopeScaling, RopeScaling

NormKind = Literal["rmsnorm", "fused_rmsnorm", "layernorm", "np_layernorm"]
AttentionKind = Literal["auto", "sdpa", "flex", "varlen"]
ScoreKind = Literal["softmax", "sigmoid"]

_POSITIVE = (
    "norm_eps",
    "rope_theta",
    "init_std",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
)
_GROUPED_MULTIPLE = 8  # torch's grouped matrix products need rows of a multiple of 16 bytes: 8 elements in bf16


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
        qkv_bias: Whether the projections to queries, keys and values have biases (Qwen2).
        rope_theta: Base of the rotary wavelengths.
        rope_scaling: How rotary wavelengths are scaled to extend the context, or None.
        window: Number of keys that a query attends to, its own and those before it (sliding window), or None for all.
        full_layers: Indices of the blocks that attend to the full sequence even so.
        rotary_fraction: Part of each head that rotary positions turn, its first dims (Phi-4-mini: 0.75).
        nope_layers: Indices of the blocks without rotary positions (SmolLM3).
        embedding_multiplier: Factor of the embeddings (Granite).
        residual_multiplier: Factor of what each block adds to the residual stream (Granite).
        attention_multiplier: Factor of the scores of attention (Granite), or None for one over the square root of `Dh`.
        logits_scaling: Divisor of the logits (Granite).
        tied_embeddings: Whether the head shares the embedding's weight.
        attention: Attention back-end; `auto` chooses the fastest one that the device supports.
        init_std: Standard deviation of the initial weights.
        family: Hugging Face's `model_type` that the model is saved as, where several could be meant; None takes the
            plainest. It changes nothing that the model computes.

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
    qkv_bias: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    rotary_fraction: float = 1.0
    nope_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    tied_embeddings: bool = False
    attention: AttentionKind = "auto"
    init_std: float = 0.02
    family: str | None = None

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "max_seq_len"]
        if self.head_dim is not None:
            sizes.append("head_dim")
        if self.window is not None:
            sizes.append("window")
        wrong = [f"{name} is {getattr(self, name)}, must be at least 1" for name in sizes if getattr(self, name) < 1]
        wrong += [
            f"{name} is {getattr(self, name)}, must be positive"
            for name in _POSITIVE
            if getattr(self, name) is not None and not getattr(self, name) > 0
        ]
        for name, kinds in (("norm", get_args(NormKind)), ("attention", get_args(AttentionKind))):
            if getattr(self, name) not in kinds:
                wrong.append(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(kinds)}")
        wrong += self._head_errors() + self._layer_errors() + self._moe_errors()
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
            else:
                wrong += self._rotary_errors()
        if self.n_heads >= 1 and self.n_kv_heads >= 1 and self.n_heads % self.n_kv_heads:
            wrong.append(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        return wrong

    def _rotary_errors(self) -> list[str]:
        wrong, width = [], self.rotary_dim
        if not 0 < self.rotary_fraction <= 1 or width < 2 or width % 2:
            wrong.append(
                f"rotary_fraction is {self.rotary_fraction}, must be above 0 and at most 1, and give an even number of "
                f"a head's {self.attention_head_dim} dims"
            )
        if isinstance(self.rope_scaling, DynamicScaling) and width == 2:
            wrong.append("rope_scaling: dynamic scaling needs heads wider than 2")
        if isinstance(self.rope_scaling, LongRopeScaling):
            lengths = {len(self.rope_scaling.short_factor), len(self.rope_scaling.long_factor)}
            if lengths != {width // 2}:
                wrong.append(
                    f"rope_scaling: short_factor and long_factor have {sorted(lengths)} entries, must have "
                    f"{width // 2}, one for each pair of dims"
                )
        return wrong

    def _layer_errors(self) -> list[str]:
        wrong = _outside("full_layers", self.full_layers, self.n_layers)
        wrong += _outside("nope_layers", self.nope_layers, self.n_layers)
        if self.window is None and self.full_layers:
            wrong.append(f"full_layers is {list(self.full_layers)}, but no layer has a window: set window")
        return wrong

    def _moe_errors(self) -> list[str]:
        if self.moe is None:
            return []
        wrong = []
        if self.dim >= 1 and self.dim % _GROUPED_MULTIPLE:
            wrong.append(f"dim {self.dim} is not a multiple of {_GROUPED_MULTIPLE}, which moe requires")
        return wrong + _outside("moe.dense_layers", self.moe.dense_layers, self.n_layers)

    @property
    def attention_head_dim(self) -> int:
        """Width of one head (`Dh`)."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Number of a head's dims that rotary positions turn."""
        return int(self.attention_head_dim * self.rotary_fraction)

    def has_experts(self, layer: int) -> bool:
        """Return whether block number `layer` has a mixture of experts."""
        return self.moe is not None and layer not in self.moe.dense_layers

    @property
    def windows(self) -> frozenset[int | None]:
        """The windows that blocks have, None for the full sequence."""
        return frozenset(self.window_of(layer) for layer in range(self.n_layers))

    def window_of(self, layer: int) -> int | None:
        """Return how many keys a query of block number `layer` attends to, or None for all before it."""
        return None if layer in self.full_layers else self.window


def _outside(name: str, layers: tuple[int, ...], n_layers: int) -> list[str]:
    """Return the error of a list of layers that has some which do not exist."""
    outside = [layer for layer in layers if not 0 <= layer < n_layers]
    return [f"{name} contains {outside}, but the layers are 0 to {n_layers - 1}"] if outside else []
