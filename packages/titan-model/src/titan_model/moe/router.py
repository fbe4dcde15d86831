"""The router: chooses the experts of each token, and records their load and the balancing loss.

Called by `moe.layer`; `moe.load_balancing` reads and resets what it records.

Shapes: `T` tokens (`B * S`), `E` experts, `k` experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_model.config import MoEConfig

_MIN_SUM = 1e-20  # of the chosen scores, all of which may underflow to 0


class Router(nn.Module):
    """Chooses each token's experts by a linear map of the token.

    Logits and scores are computed in fp32 whatever the dtype of the model, also under autocast. (If mixed precision
    passes the weight in bf16, the weight is rounded, but the sum over `D` and everything after it is not.) It is not an
    `nn.Linear`, so that conversions of linear layers to lower precision (float8) do not apply to it.

    Loads are recorded in the backward pass, so that every forward counts exactly once: a recomputed one (activation
    checkpointing) is not counted twice, nor is one with two backward passes, and one without a backward is not counted.
    The balancing loss enters the gradient once too: if `moe.balance_loss` is set, a second backward is refused.

    Args:
        dim: Width of the residual stream (`D`).
        moe: The mixture's shape.

    Attributes:
        weight: `[E, D]`.
        bias: fp32 `[E]`, added to the scores for the choice of experts only; a buffer, updated by `balance_experts`.
            None if `moe.balance_bias_rate` is 0.
        load: fp32 `[E + 2]`, recorded by the backward passes since the last `balance_experts`: token-expert pairs of
            each expert, the sum over tokens of the entropy of their scores, and the sum over tokens of the balancing
            loss. A non-persistent buffer.
        num_target_tokens: Scalar, what the caller divides the summed loss by; see `set_num_target_tokens`.
        sum_over_sequence: Sums counts over the ranks that hold parts of the same sequences; see
            `set_sequence_sum`. None if every rank holds full sequences.
    """

    bias: Tensor | None
    load: Tensor

    def __init__(self, dim: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.n_experts, dim))
        nn.init.uniform_(self.weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))  # as nn.Linear
        has_bias = moe.balance_bias_rate > 0
        self.register_buffer("bias", torch.zeros(moe.n_experts, dtype=torch.float32) if has_bias else None)
        self.register_buffer("load", torch.zeros(moe.n_experts + 2, dtype=torch.float32), persistent=False)
        self.num_target_tokens: Tensor | None = None
        self.sum_over_sequence: Callable[[Tensor], Tensor] | None = None

    def reset_buffers(self, device: torch.device | str) -> None:
        """Set the buffers that are in no file to their initial values, on a device."""
        self.load = torch.zeros_like(self.load, device=device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            x: `[..., S, D]`.

        Returns:
            fp32 `[T, k]`, the weight of each chosen expert's output, and integers `[T, k]`, the chosen experts.
        """
        with _no_autocast(x.device.type):
            logits = F.linear(x.float(), self.weight.float())  # [..., S, E]
            scores = logits.softmax(-1) if self.moe.score == "softmax" else logits.sigmoid()
            preference = scores.detach() if self.bias is None else scores.detach() + self.bias
            chosen = preference.topk(self.moe.top_k).indices  # [..., S, k]
            weights = scores.gather(-1, chosen)
            if self.moe.normalize_top_k:
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(_MIN_SUM)
            weights = weights * self.moe.route_scale
            if self.training and torch.is_grad_enabled():
                weights = self._record_load(weights, scores, chosen)
        return weights.flatten(0, -2), chosen.flatten(0, -2)

    def _record_load(self, weights: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return `weights` unchanged; their backward records the load and adds the gradient of the balancing loss.

        The loss of one sequence is S * E * sum over experts of (share of its token-expert pairs) * (mean probability),
        which is S if both are even (Switch Transformer, Fedus et al. 2021, arXiv:2101.03961, eq. 4). It is computed
        over each sequence separately (as in DeepSeek-V2, arXiv:2405.04434), so that it does not depend on how a batch
        is split into microbatches and over ranks.
        """
        n_experts = scores.shape[-1]
        pairs = chosen.flatten(-2)  # [..., S * k]
        counts = scores.new_zeros(*pairs.shape[:-1], n_experts)
        counts = counts.scatter_add(-1, pairs, torch.ones_like(pairs, dtype=scores.dtype))  # [..., E]
        # The loss is linear in the probabilities: with the shares of full sequences, the losses of their parts add up.
        full = counts if self.sum_over_sequence is None else self.sum_over_sequence(counts)
        shares = full / full.sum(-1, keepdim=True).clamp_min(1)
        probabilities = scores if self.moe.score == "softmax" else scores / scores.sum(-1, keepdim=True)
        balance = n_experts * (shares * probabilities.sum(-2)).sum()
        entropy = torch.special.entr(probabilities.detach()).sum()
        record = torch.cat((counts.view(-1, n_experts).sum(0), torch.stack((entropy, balance.detach()))))
        loss = self.moe.balance_loss * balance / self._required_num_target_tokens() if self.moe.balance_loss else None
        recorded: Tensor = _RecordLoad.apply(weights, loss, record, self.load)
        return recorded

    def _required_num_target_tokens(self) -> Tensor:
        if self.num_target_tokens is None:
            raise RuntimeError(
                f"moe.balance_loss is {self.moe.balance_loss}, but num_target_tokens is not set: call "
                "titan_model.set_num_target_tokens(model, num_target_tokens) before the forward pass of each training "
                "step, with the number that the summed loss is divided by (1 if it remains a sum)"
            )
        return self.num_target_tokens

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - nn.Module's
        """Move to another device or dtype (`to`, `to_empty`), keeping the buffers in fp32 and initialized.

        In bf16, counts would saturate at 256 and small updates of the bias would be rounded away; `to_empty` would
        leave uninitialized memory.

        torch 2.11 to 2.15: `nn.Module._apply` is private, but the only place that all of `to`, `cuda`, `bfloat16` and
        `to_empty` pass through.
        """
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.load = torch.zeros_like(self.load, dtype=torch.float32)
        if bias is not None and self.bias is not None:
            new = torch.zeros_like(self.bias, dtype=torch.float32)
            self.bias = new if bias.is_meta else new.copy_(bias)
        return self


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class _RecordLoad(torch.autograd.Function):
    """The identity on `weights`, whose backward adds `record` to `load` and backpropagates `loss` with gradient 1."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor | None, record: Tensor, load: Tensor) -> Tensor:
        ctx.save_for_backward(record)
        ctx.load = load  # not `save_for_backward`: it may be changed in place before the backward
        ctx.has_loss, ctx.recorded = loss is not None, False
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (record,) = ctx.saved_tensors
        if torch.compiler.is_compiling():  # compiled code cannot keep the mark; by default it refuses a second backward
            ctx.load.add_(record)
        elif not ctx.recorded:
            ctx.load.add_(record)
            ctx.recorded = True
        elif ctx.has_loss:
            raise RuntimeError(
                "mixture of experts: backward was called twice, and the balancing loss (moe.balance_loss) would count "
                "twice; add up the losses and call backward once, or run the forward again"
            )
        return grad, torch.ones_like(record[0]) if ctx.has_loss else None, None, None
