"""The language-model loss: output head and cross-entropy together, one chunk of tokens at a time.

Called by `layers.lm_head`, and by users with a head of their own. Logits are the largest tensor of a training step:
`[B * S, V]` takes 4 GiB in fp32 at 8,192 tokens and a vocabulary of 128,256, and cross-entropy needs several tensors of
that size. Here only one chunk of them exists at a time. The gradient of each chunk is computed in the forward pass, so
that nothing is computed twice (as in Liger Kernel, Hsu et al. 2024, arXiv:2410.10989).

Shapes: `B` batch, `S` sequence, `N` tokens of one chunk, `D` model dim, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp, all_reduce
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from titan_model._torch_compat import local_shape_and_offset
from titan_model.fused_ops import autocast_dtype
from titan_model.token_ids import NOT_SCORED, check_range

_CHUNK_LOGITS = 1 << 26  # logits per chunk: 256 MiB in fp32
_MIN_CHUNK_TOKENS = 256  # smaller matrix products are slow


class LossSums(NamedTuple):
    """Sums of the loss over the scored tokens of a batch.

    They are sums, not means, because only the caller knows the number of scored tokens of the global batch.

    Attributes:
        total: Scalar: cross-entropy plus z-loss. Call `backward` on this one.
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
    """Return the summed cross-entropy of the logits `x @ weight.T`, without materializing all of them.

    Args:
        x: `[B, S, D]`.
        weight: `[V, D]`; if it is a DTensor sharded over `V`, each rank computes its share of the logits.
        labels: Integers `[B, S]` in `range(V)`, already shifted; -100 is not scored.
        z_loss: Coefficient of the squared log of the softmax's denominator, summed over scored tokens (PaLM,
            Chowdhery et al. 2022: 1e-4), which keeps logits from drifting.
        source_ids: Integers `[B]`: the source of each sequence, in `range(n_sources)`; None: source 0.
        n_sources: Number of sources, for a separate cross-entropy per source.
        chunk_tokens: Tokens per chunk; None chooses by the size of the vocabulary.

    Returns:
        The sums, in fp32, equal on all ranks that share a sharded weight.

    Raises:
        ValueError: If a label is neither in `range(V)` nor -100, or the shapes differ. (On CUDA a label is checked on
            the device, without waiting: CUDA prints the message and fails in a later call.)

    Example:
        >>> import torch
        >>> from titan_model import linear_cross_entropy
        >>> x, weight = torch.zeros(1, 3, 8, requires_grad=True), torch.zeros(10, 8)
        >>> sums = linear_cross_entropy(x, weight, labels=torch.tensor([[4, 2, -100]]))
        >>> (sums.total / sums.scored.sum()).backward()
        >>> f"{sums.total.item() / 2:.4f}"  # ln(10): all ten tokens are equally likely
        '2.3026'
    """
    vocab_size = weight.shape[0]
    group, first_column = None, 0
    if isinstance(weight, DTensor):
        x, weight, group, first_column = _local_shares(x, weight)
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels: shape {list(labels.shape)} differs from that of tokens, {list(x.shape[:-1])}")
    check_range("labels", labels, vocab_size, f"{NOT_SCORED} marks what is not scored", except_value=NOT_SCORED)
    # Cast once here: inside, autocast would cast the weight again for each chunk.
    dtype = autocast_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    options = _Options(
        first_column=first_column,
        group=group,
        chunk_tokens=chunk_tokens or max(_MIN_CHUNK_TOKENS, _CHUNK_LOGITS // weight.shape[0]),
        z_loss=z_loss,
        differentiate=torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad),
    )
    flat = labels.flatten().long()
    total, each, z = _LinearCrossEntropy.apply(x.flatten(0, -2), weight, flat, options)
    sources = torch.zeros_like(flat) if source_ids is None else source_ids.repeat_interleave(labels.shape[1])
    zeros = each.new_zeros(n_sources)
    scored = torch.zeros(n_sources, dtype=torch.int64, device=flat.device)
    return LossSums(
        total=total,
        cross_entropy=zeros.index_add(0, sources, each),
        z_loss=z,
        scored=scored.index_add(0, sources, (flat != NOT_SCORED).long()),
    )


class _Options(NamedTuple):
    """How the loss is computed.

    Attributes:
        first_column: Number of this rank's first column of the logits, where they are split over the vocabulary.
        group: The ranks that they are split over; None: they are not split.
        chunk_tokens: Tokens whose logits exist at one time.
        z_loss: Coefficient of the z-loss.
        differentiate: Whether gradients are needed.
    """

    first_column: int
    group: ProcessGroup | None
    chunk_tokens: int
    z_loss: float
    differentiate: bool


def _local_shares(x: Tensor, weight: DTensor) -> tuple[Tensor, Tensor, ProcessGroup, int]:
    """Return `x` unsharded, this rank's rows of `weight`, the ranks that share it, and the number of its first row."""
    mesh = weight.device_mesh
    if mesh.ndim != 1:
        raise ValueError(
            f"weight: it is split over a mesh of {mesh.ndim} dims, must be over one (FSDP gathers its dim before the "
            "forward): call the loss from the head's own forward"
        )
    if weight.placements != (Shard(0),):
        weight = weight.redistribute(placements=[Shard(0)])
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    if x.placements != (Replicate(),):  # otherwise the gradient would be summed twice: here and where x was gathered
        x = x.redistribute(placements=[Replicate()])
    unsharded = x.to_local(grad_placements=[Partial()])  # each rank's logits contribute a part of x's gradient
    _, (first, _) = local_shape_and_offset(weight)
    return unsharded, weight.to_local(), mesh.get_group(), first


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the loss and its gradients in the forward pass; the backward pass only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        each = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
        z_sum = torch.zeros((), dtype=torch.float32, device=x.device)
        needs_x, needs_weight = (options.differentiate and needed for needed in ctx.needs_input_grad[:2])
        x_grad = torch.empty_like(x) if needs_x else None
        weight_grad: Tensor | None = None
        for start in range(0, len(labels), options.chunk_tokens):
            part = slice(start, start + options.chunk_tokens)
            losses, log_sums, logits_grad = _cross_entropy(F.linear(x[part], weight).float(), labels[part], options)
            each[part] = losses
            z_sum += options.z_loss * log_sums.square().sum()
            if logits_grad is None:
                continue
            logits_grad = logits_grad.to(x.dtype)
            if x_grad is not None:
                x_grad[part] = logits_grad @ weight
            if needs_weight:
                weight_grad = _accumulate(weight_grad, logits_grad, x[part])
        ctx.gradients = x_grad, weight_grad
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(each, z_sum)
        return each.sum() + z_sum, each, z_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_cross_entropy: backward was called twice, but the gradients are kept for one call; "
                "compute the loss again"
            )
        x_grad, weight_grad = ctx.gradients
        ctx.gradients = None
        scaled_x = None if x_grad is None else x_grad.mul_(grad_total)
        scaled_weight = None if weight_grad is None else weight_grad.mul_(grad_total).to(ctx.weight_dtype)
        return scaled_x, scaled_weight, None, None


def _accumulate(total: Tensor | None, logits_grad: Tensor, x: Tensor) -> Tensor:
    """Add a chunk's gradient of the weight `[V, D]`, in fp32: in bf16 later chunks would be rounded away."""
    if total is None:
        return (logits_grad.t() @ x).float()
    return total.addmm_(logits_grad.t(), x) if x.dtype == total.dtype else total.add_(logits_grad.t() @ x)


def _cross_entropy(logits: Tensor, labels: Tensor, options: _Options) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return each token's cross-entropy, the log of its softmax's denominator, and the gradient of the logits.

    Args:
        logits: `[N, V]` in fp32, or this rank's columns of it.
        labels: Integers `[N]`.
        options: How the loss is computed.

    Returns:
        `[N]`, `[N]` (both zero where a token is not scored), and the gradient in the shape of `logits`, or None.
    """
    scored = labels != NOT_SCORED
    columns = labels - options.first_column
    mine = scored & (columns >= 0) & (columns < logits.shape[1])
    columns = columns.where(mine, 0)[:, None]
    log_probabilities = logits.log_softmax(-1)
    target = logits.gather(1, columns).squeeze(1)
    log_sum = target - log_probabilities.gather(1, columns).squeeze(1)
    target = target.where(mine, 0.0)
    if options.group is not None:
        local = log_sum
        log_sum = _log_sum_over_ranks(local, options.group)
        log_probabilities += (local - log_sum)[:, None]
        all_reduce(target, ReduceOp.SUM, group=options.group)
    gradient = None
    if options.differentiate:
        scale = (1 + 2 * options.z_loss * log_sum).where(scored, 0.0)
        gradient = log_probabilities.exp_()
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
