"""Load balancing of experts: what a training loop calls once per step.

Before the forward passes `set_num_target_tokens`, after the backward passes `balance_experts`, which also returns
metrics of the load. Both act on the model's `Router` modules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from titan_model.moe.router import Router

EXPERT_METRICS = ("experts/max_load", "experts/idle", "experts/entropy", "experts/balance_loss")


def set_num_target_tokens(model: nn.Module, num_target_tokens: float | Tensor) -> None:
    """Set what the summed loss is divided by, before the forward passes of a step.

    The balancing loss (`moe.balance_loss`) is a sum over tokens, as the language-model loss is, but it is not part of
    the returned loss: its gradient is added in the backward pass and has to be divided by the same number. Does nothing
    if `moe.balance_loss` is 0.

    Args:
        model: The model or a part of it, with or without wrappers.
        num_target_tokens: What the caller divides the summed loss by: for a mean over tokens, the number of scored
            tokens of the global batch.
    """
    for router in _routers(model):
        if not router.moe.balance_loss:
            continue
        if router.num_target_tokens is None or router.num_target_tokens.device != router.load.device:
            router.num_target_tokens = torch.empty((), dtype=torch.float32, device=router.load.device)
        # In place, because compiled blocks recompile if the attribute becomes another tensor.
        router.num_target_tokens.copy_(torch.as_tensor(num_target_tokens))


def set_sequence_sum(model: nn.Module, sum_over_sequence: Callable[[Tensor], Tensor] | None) -> None:
    """Set how the routers sum over the ranks that hold parts of the same sequences (context parallelism).

    The balancing loss is computed over full sequences, which takes the counts of all their parts.

    Args:
        model: The model or a part of it, with or without wrappers.
        sum_over_sequence: Returns the sum of a tensor `[B, E]` over those ranks, without gradient. It is called once in
            each router's forward. None: every rank holds full sequences.
    """
    for router in _routers(model):
        router.sum_over_sequence = sum_over_sequence


@torch.no_grad()
def balance_experts(model: nn.Module, all_reduce: Callable[[Tensor], None] | None = None) -> dict[str, Tensor]:
    """Update the routers' selection biases from the load of the last step, and return its metrics. Once per step.

    If `moe.balance_bias_rate` is set, it is added to the bias of each expert below the mean load and subtracted from
    that of each expert above it (loss-free balancing, Wang et al. 2024, arXiv:2408.15664). The load counts the tokens
    of all backward passes since the last call, and is then reset.

    Args:
        model: The model or a part of it (a pipeline stage), with or without wrappers.
        all_reduce: Sums a tensor in place over the ranks that processed other tokens (data-parallel ranks; not those
            that share tokens, as tensor-parallel ranks do). None: there are no such ranks. Called once, if the model
            has experts.

    Returns:
        Scalars on the model's device, equal on all ranks of the sum; empty if the model has no experts. Over the ranks
        of a pipeline, reduce the first by its maximum and the others by their mean over blocks:

        - `experts/max_load`: load of the busiest expert of any block, over the mean load;
        - `experts/idle`: fraction of experts that no token was routed to;
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
    max_load = (counts / mean.clamp_min(1 / counts.shape[1])).max()
    return dict(zip(EXPERT_METRICS, (max_load, (counts == 0).double().mean(), entropy, balance), strict=True))


def _routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]
