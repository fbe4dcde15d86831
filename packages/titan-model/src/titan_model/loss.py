"""The language-model loss: head and cross-entropy together, some tokens at a time.

Logits are the largest tensor of a training step: `[B * S, V]` takes 4 GiB in fp32 at 8,192 tokens and a vocabulary of
128,256, and cross-entropy wants it several times over. Here only a slice of it exists at once. The gradient of each
slice is taken right away, in the forward pass, so that nothing is computed twice (the way of Liger Kernel, Hsu et al.
2024, arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from titan_model.fused_ops import autocast_dtype

NOT_SCORED = -100
_CHUNK_LOGITS = 1 << 26  # logits held at once, 256 MiB in fp32
_CHUNK_ROWS = 256  # but at least so many tokens: thinner matrix products are slow


class LossSums(NamedTuple):
    """Sums over the scored tokens of a batch, for the caller to divide by what only it knows.

    Attributes:
        total: Scalar: cross-entropy plus z-loss. The one to differentiate.
        cross_entropy: `[n_sources]`, in nats, without gradient.
        z_loss: Scalar: the part of `total` that is z-loss, without gradient.
        scored: Integers `[n_sources]`: number of scored tokens.
    """

    total: Tensor
    cross_entropy: Tensor
    z_loss: Tensor
    scored: Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    source_ids: Tensor | None = None,
    n_sources: int = 1,
    chunk_tokens: int | None = None,
) -> LossSums:
    """Return the summed cross-entropy of `x @ weight.T` without ever holding all of these logits.

    Args:
        x: `[B, S, D]`.
        weight: `[V, D]`; may be a DTensor sharded over `V`, each rank then computes its share of the logits.
        labels: Integers `[B, S]`, already shifted; -100 is not scored.
        z_loss: Coefficient of the squared log of the softmax's denominator, summed over scored tokens (PaLM,
            Chowdhery et al. 2022: 1e-4), which keeps logits from drifting.
        source_ids: Integers `[B]`, the source of each row in `range(n_sources)`; None is source 0.
        n_sources: How many sources to keep apart.
        chunk_tokens: Tokens whose logits are held at once; None chooses by the size of the vocabulary.

    Returns:
        The sums, in fp32, equal on all ranks that share a sharded weight.
    """
    group, first = None, 0
    if isinstance(weight, DTensor):
        x, weight, group, first = _local_shares(x, weight)
    # Once, here: inside, autocast would convert the weight anew for each chunk.
    dtype = autocast_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    rows = chunk_tokens or max(_CHUNK_ROWS, _CHUNK_LOGITS // weight.shape[0])
    differentiate = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    flat = labels.flatten()
    total, each, z = _LinearCrossEntropy.apply(
        x.flatten(0, -2), weight, flat, _Slicing(first, rows, group), z_loss, differentiate
    )
    sources = torch.zeros_like(flat) if source_ids is None else source_ids.repeat_interleave(labels.shape[1])
    zeros = each.new_zeros(n_sources)
    scored = torch.zeros(n_sources, dtype=torch.int64, device=flat.device)
    return LossSums(
        total=total,
        cross_entropy=zeros.index_add(0, sources, each),
        z_loss=z,
        scored=scored.index_add(0, sources, (flat != NOT_SCORED).long()),
    )


class _Slicing(NamedTuple):
    """How the logits are cut: columns between the ranks of a group, rows one chunk after the other."""

    first_column: int
    rows: int
    group: ProcessGroup | None


def _local_shares(x: Tensor, weight: DTensor) -> tuple[Tensor, Tensor, ProcessGroup, int]:
    """Return the whole `x`, this rank's rows of `weight`, the ranks that share it, and its first row's number."""
    mesh = weight.device_mesh
    assert mesh.ndim == 1, "the head's weight is split over one mesh dim: FSDP gathers its own before the forward"
    if weight.placements != (Shard(0),):
        weight = weight.redistribute(placements=[Shard(0)])
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    if x.placements != (Replicate(),):  # torch would sum the gradient twice, here and where x was gathered
        x = x.redistribute(placements=[Replicate()])
    whole = x.to_local(grad_placements=[Partial()])  # each rank's share of the logits gives a share of x's gradient
    _, (first, _) = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    return whole, weight.to_local(), mesh.get_group(), first


class _LinearCrossEntropy(torch.autograd.Function):
    """Takes the loss and, with it, its gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, slicing: _Slicing, z_loss: float, differentiate: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        each = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
        z_sum = torch.zeros((), dtype=torch.float32, device=x.device)
        wants_x, wants_weight = (differentiate and wanted for wanted in ctx.needs_input_grad[:2])
        x_grad = torch.empty_like(x) if wants_x else None
        weight_grad: Tensor | None = None
        for start in range(0, len(labels), slicing.rows):
            part = slice(start, start + slicing.rows)
            losses, log_sums, logits_grad = _cross_entropy(
                F.linear(x[part], weight).float(), labels[part], slicing, z_loss, differentiate
            )
            each[part] = losses
            z_sum += z_loss * log_sums.square().sum()
            if logits_grad is None:
                continue
            logits_grad = logits_grad.to(x.dtype)
            if x_grad is not None:
                x_grad[part] = logits_grad @ weight
            if wants_weight:
                weight_grad = _accumulate(weight_grad, logits_grad, x[part])
        ctx.gradients = x_grad, weight_grad
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(each, z_sum)
        return each.sum() + z_sum, each, z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("backward ran twice through one linear_cross_entropy: its gradients are kept for one")
        x_grad, weight_grad = ctx.gradients
        ctx.gradients = None
        scaled_x = None if x_grad is None else x_grad.mul_(grad_total)
        scaled_weight = None if weight_grad is None else weight_grad.mul_(grad_total).to(ctx.weight_dtype)
        return scaled_x, scaled_weight, None, None, None, None


def _accumulate(total: Tensor | None, logits_grad: Tensor, x: Tensor) -> Tensor:
    """Add a chunk's share of the weight's gradient `[V, D]`, in fp32: in bf16 the later ones would be rounded away."""
    if total is None:
        return (logits_grad.t() @ x).float()
    return total.addmm_(logits_grad.t(), x) if x.dtype == total.dtype else total.add_(logits_grad.t() @ x)


def _cross_entropy(
    logits: Tensor, labels: Tensor, slicing: _Slicing, z_loss: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return each token's cross-entropy, the log of its softmax's denominator, and the gradient of the logits.

    Args:
        logits: `[N, V]` in fp32, or this rank's columns of it.
        labels: Integers `[N]`.
        slicing: Which columns these are.
        z_loss: Its coefficient, for the gradient.
        differentiate: Whether the gradient is wanted.

    Returns:
        `[N]`, `[N]` (both zero where a token is not scored), and the gradient as `logits`, or None.
    """
    scored = labels != NOT_SCORED
    columns = labels - slicing.first_column
    mine = scored & (columns >= 0) & (columns < logits.shape[1])
    columns = columns.where(mine, 0)[:, None]
    log_shares = logits.log_softmax(-1)
    target = logits.gather(1, columns).squeeze(1)
    log_sum = target - log_shares.gather(1, columns).squeeze(1)
    target = target.where(mine, 0.0)
    if slicing.group is not None:
        local = log_sum
        log_sum = _log_sum_over_ranks(local, slicing.group)
        log_shares += (local - log_sum)[:, None]
        all_reduce(target, ReduceOp.SUM, group=slicing.group)
    gradient = None
    if differentiate:
        scale = (1 + 2 * z_loss * log_sum).where(scored, 0.0)
        gradient = log_shares.exp_()
        gradient *= scale[:, None]
        gradient.scatter_add_(1, columns, -mine.float()[:, None])
    return (log_sum - target).where(scored, 0.0), log_sum.where(scored, 0.0), gradient


def _log_sum_over_ranks(local: Tensor, group: ProcessGroup) -> Tensor:
    """Return the log of the sum of `exp(local)` over the ranks of a group."""
    highest = local.clone()
    all_reduce(highest, ReduceOp.MAX, group=group)
    total = (local - highest).exp()
    all_reduce(total, ReduceOp.SUM, group=group)
    return highest + total.log()
