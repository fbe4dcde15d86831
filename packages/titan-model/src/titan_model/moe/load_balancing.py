"""What a training loop does once per step to keep the load of experts even, and to know how even it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from titan_model.moe.router import Router

EXPERT_FIGURES = ("experts/max_load", "experts/idle", "experts/entropy", "experts/balance_loss")


def set_loss_normaliser(model: nn.Module, normaliser: float | Tensor) -> None:
    """Tell the routers what the summed loss is divided by, before the forward passes of a step.

    The balancing loss (`moe.balance_loss`) is a sum over tokens as the language-model loss is, but it never leaves its
    block: its gradient joins in the backward pass, where the caller's division has to be made up for. Does nothing to
    a model without such a loss.

    Args:
        model: The model or a part of it, however wrapped.
        normaliser: What the caller divides the summed loss by: for a mean over tokens, the number of scored tokens
            of the global batch.
    """
    for router in _routers(model):
        if not router.moe.balance_loss:
            continue
        if router.normaliser is None or router.normaliser.device != router.load.device:
            router.normaliser = torch.empty((), dtype=torch.float32, device=router.load.device)
        # In place, as compiled blocks look out for another tensor.
        router.normaliser.copy_(torch.as_tensor(normaliser))


def set_sequence_sum(model: nn.Module, sum_over_sequence: Callable[[Tensor], Tensor] | None) -> None:
    """Tell the routers how to sum over the ranks that hold parts of the same sequences (context parallelism).

    The balancing loss is that of whole sequences. Which share of a sequence went to which expert takes all its parts.

    Args:
        model: The model or a part of it, however wrapped.
        sum_over_sequence: Returns the sum of a tensor `[B, E]` over those ranks, in which no gradient flows. It is
            called once in each router's forward. None: every rank holds whole sequences.
    """
    for router in _routers(model):
        router.sum_over_sequence = sum_over_sequence


@torch.no_grad()
def balance_experts(model: nn.Module, all_reduce: Callable[[Tensor], None] | None = None) -> dict[str, Tensor]:
    """Move the routers' biases against the load of the step that was, and say how even it was. Once per step.

    Where `moe.balance_bias_rate` is set, the bias of each expert with less than the mean load rises by it, that of
    each with more falls by it (loss-free balancing, Wang et al. 2024, arXiv:2408.15664). What is counted are the
    tokens of all backward passes since the last call; then counting starts anew.

    Args:
        model: The model or a part of it (a pipeline stage), however wrapped.
        all_reduce: Sums a tensor in place over the ranks that had other tokens (the data ranks; not those that share
            tokens, as tensor-parallel ranks do). None: there are no others. Called once, if there are experts.

    Returns:
        Scalars on the model's device, equal on all ranks of the sum; empty if the model has no experts. Between the
        ranks of a pipeline the first is to be reduced by its maximum, the others by their mean over blocks:

        - `experts/max_load`: load of the busiest expert of any block, over the mean load;
        - `experts/idle`: share of experts that no token went to;
        - `experts/entropy`: entropy of a token's scores in nats, mean over tokens and blocks;
        - `experts/balance_loss`: the balancing loss per token without its coefficient, mean over blocks; 1 is even.
    """
    routers = _routers(model)
    if not routers:
        return {}
    record = torch.stack([router.load for router in routers]).double()  # [layers, E + 2], exact up to 2**53 tokens
    if all_reduce is not None:
        all_reduce(record)
    counts, sums = record[:, :-2], record[:, -2:]
    mean = counts.mean(1, keepdim=True)
    for router, below in zip(routers, mean - counts, strict=True):
        if router.bias is not None:
            router.bias.add_(below.sign(), alpha=router.moe.balance_bias_rate)
        router.load.zero_()
    top_k = routers[0].moe.top_k
    tokens = (counts.sum(1, keepdim=True) / top_k).clamp_min(1)
    entropy, balance = (sums / tokens).mean(0)
    highest = (counts / mean.clamp_min(1 / counts.shape[1])).max()
    return dict(zip(EXPERT_FIGURES, (highest, (counts == 0).double().mean(), entropy, balance), strict=True))


def _routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]
