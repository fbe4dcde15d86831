"""What may be changed while weights are loaded: settings that do not follow from the weights, and the vocabulary.

Called by `huggingface_files`, before and after `loading` reads the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from titan_model.config import AttentionKind, DecoderConfig, NormKind
from titan_model.rope_scalings import RopeScaling

_NORMS = ("rmsnorm", "fused_rmsnorm")  # the same function


class LoadChanges(TypedDict, total=False):
    """Settings of a model that differ from those of its files; the names are those of `DecoderConfig` and `MoEConfig`.

    Attributes:
        attention: Attention back-end.
        norm: `rmsnorm` or `fused_rmsnorm`, the same function.
        max_seq_len: Longest sequence.
        rope_theta: Base of the rotary wavelengths, to extend the context.
        rope_scaling: Scaling of the rotary wavelengths, to extend the context.
        init_std: Standard deviation of initial weights (none is drawn here).
        vocab_size: Number of token ids. If there are more than rows in the files, each new row of embedding and head is
            the mean of the file's rows, so that no new token is likely; if there are fewer, the last rows are dropped.
        balance_loss: Coefficient of the load-balancing loss, for experts.
        balance_bias_rate: Rate of the experts' selection bias.
    """

    attention: AttentionKind
    norm: NormKind
    max_seq_len: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    init_std: float
    vocab_size: int
    balance_loss: float
    balance_bias_rate: float


def change_config(config: DecoderConfig, changes: Mapping[str, Any]) -> DecoderConfig:
    """Return the config of a model that is loaded with changes.

    Args:
        config: The config of the files.
        changes: A `LoadChanges`.

    Raises:
        ValueError: If a change is not one of these, or does not fit the config.
    """
    unknown = [name for name in changes if name not in LoadChanges.__annotations__]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: the weights determine it, or it is not a setting; loading can change "
            f"{', '.join(LoadChanges.__annotations__)}"
        )
    own = {name: value for name, value in changes.items() if not name.startswith("balance_")}
    of_experts = {name: value for name, value in changes.items() if name.startswith("balance_")}
    if of_experts and config.moe is None:
        raise ValueError(f"{', '.join(of_experts)}: the model has no experts")
    if own.get("norm", config.norm) not in _NORMS:
        raise ValueError(
            f"norm is {own['norm']!r}, must be one of {', '.join(_NORMS)}: the weights are those of an RMSNorm"
        )
    if config.moe is not None:
        own["moe"] = replace(config.moe, **of_experts)
    return replace(config, **own)


def resize_vocabulary(rows: Tensor, vocab_size: int) -> Tensor:
    """Return an embedding or a head `[V, D]` with `vocab_size` rows; see `LoadChanges`."""
    more = vocab_size - len(rows)
    if more <= 0:
        return rows[:vocab_size].clone()
    mean = rows.mean(0, keepdim=True, dtype=torch.promote_types(rows.dtype, torch.float32))
    return torch.cat([rows, mean.to(rows.dtype).expand(more, -1)])
