"""The router: which experts a token goes to, and what keeps their load even.

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

_LEAST_SUM = 1e-20  # of the chosen scores, which may all have underflowed


class Router(nn.Module):
    """Chooses each token's experts by a linear map of the token.

    Logits and scores are computed in fp32 whatever the dtype of the model, under autocast too. (A weight that mixed
    precision hands over in bf16 has been rounded by then; the sum over `D` and all that follows has not.) It is no
    `nn.Linear`, so that what rewrites these to lower precision leaves it alone.

    What it sees in training is recorded in the backward pass, where every forward counts once: recomputed ones
    (activation checkpointing) no more than others, and those without a backward not at all.

    Args:
        dim: Width of the residual stream (`D`).
        moe: The mixture's shape.

    Attributes:
        weight: `[E, D]`.
        bias: fp32 `[E]`, added to the scores for the choice alone; a buffer, moved by `balance_experts`. None where
            `moe.balance_bias_rate` is 0.
        load: fp32 `[E + 2]`, what the backward passes since the last `balance_experts` recorded: pairs of token and
            expert for each expert, the sum over tokens of the entropy of their scores, and the sum over tokens of the
            balancing loss. A buffer that is in no state dict.
        normaliser: Scalar, what the caller divides the summed loss by; see `set_loss_normaliser`.
        sum_over_sequence: Sums counts over the ranks that hold parts of the same sequences; see
            `set_sequence_sum`. None where every rank holds whole ones.
    """

    bias: Tensor | None
    load: Tensor

    def __init__(self, dim: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.n_experts, dim))
        nn.init.uniform_(self.weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))  # as torch's own linears
        has_bias = moe.balance_bias_rate > 0
        self.register_buffer("bias", torch.zeros(moe.n_experts, dtype=torch.float32) if has_bias else None)
        self.register_buffer("load", torch.zeros(moe.n_experts + 2, dtype=torch.float32), persistent=False)
        self.normaliser: Tensor | None = None
        self.sum_over_sequence: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose experts.

        Args:
            x: `[..., S, D]`.

        Returns:
            fp32 `[T, k]`, what each chosen expert's output counts, and integers `[T, k]`, which experts these are.
        """
        with _no_autocast(x.device.type):
            logits = F.linear(x.float(), self.weight.float())  # [..., S, E]
            scores = logits.softmax(-1) if self.moe.score == "softmax" else logits.sigmoid()
            preference = scores.detach() if self.bias is None else scores.detach() + self.bias
            chosen = preference.topk(self.moe.top_k).indices  # [..., S, k]
            weights = scores.gather(-1, chosen)
            if self.moe.normalise_top_k:
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(_LEAST_SUM)
            weights = weights * self.moe.route_scale
            if self.training and torch.is_grad_enabled():
                weights = self._observe(weights, scores, chosen)
        return weights.flatten(0, -2), chosen.flatten(0, -2)

    def _observe(self, weights: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        """Return `weights`, in whose backward the load is recorded and the balancing loss adds its gradient.

        The loss of one sequence is S * E * sum over experts of (share of its token-expert pairs) * (mean probability),
        which is S where both are even (Switch Transformer, Fedus et al. 2021, arXiv:2101.03961, eq. 4). It is taken
        over each sequence by itself (as by DeepSeek-V2, arXiv:2405.04434), so that it does not depend on how a batch
        is cut into microbatches and ranks.
        """
        n_experts = scores.shape[-1]
        pairs = chosen.flatten(-2)  # [..., S * k]
        counts = scores.new_zeros(*pairs.shape[:-1], n_experts)
        counts = counts.scatter_add(-1, pairs, torch.ones_like(pairs, dtype=scores.dtype))  # [..., E]
        # The loss is linear in the probabilities: given the shares of whole sequences, its parts add up.
        whole = counts if self.sum_over_sequence is None else self.sum_over_sequence(counts)
        shares = whole / whole.sum(-1, keepdim=True).clamp_min(1)
        probabilities = scores if self.moe.score == "softmax" else scores / scores.sum(-1, keepdim=True)
        balance = n_experts * (shares * probabilities.sum(-2)).sum()
        entropy = torch.special.entr(probabilities.detach()).sum()
        record = torch.cat((counts.view(-1, n_experts).sum(0), torch.stack((entropy, balance.detach()))))
        loss = self.moe.balance_loss * balance / self._loss_normaliser() if self.moe.balance_loss else None
        observed: Tensor = _Observe.apply(weights, loss, record, self.load)
        return observed

    def _loss_normaliser(self) -> Tensor:
        if self.normaliser is None:
            raise RuntimeError(
                f"moe.balance_loss is {self.moe.balance_loss}, but the router does not know what the summed loss will "
                "be divided by: call titan_model.set_loss_normaliser(model, normaliser) before the forward pass of "
                "each training step (with 1 if the loss stays a sum)"
            )
        return self.normaliser

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device or dtype, as `to` and `to_empty` do, with the buffers whole and in fp32.

        In bf16 counts would stop at 256 and the bias at steps of its rounding; `to_empty` would leave memory as found.
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


class _Observe(torch.autograd.Function):
    """The identity on weights, whose backward adds `record` to `load` and starts the gradient of `loss`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor | None, record: Tensor, load: Tensor) -> Tensor:
        ctx.save_for_backward(record)
        ctx.load = load  # not saved as the record is: it may change until the backward comes
        ctx.has_loss = loss is not None
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (record,) = ctx.saved_tensors
        ctx.load.add_(record)
        return grad, torch.ones_like(record[0]) if ctx.has_loss else None, None, None
