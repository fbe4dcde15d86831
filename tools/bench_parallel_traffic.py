"""What a step of each layout sends, counted, against theory.

Bytes are those of the whole tensor that a collective gathers, scatters or sums, and of what a rank itself hands to an
all-to-all or sends to a peer; the mean over ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import titan_model
from bench_parallel_work import EXPERTS, Settings, in_group, laid_out, one_row, total_loss
from titan_model import DecoderConfig
from titan_parallel import Degrees, ParallelOptions, PipelineOptions

Bytes = dict[str, float]


@dataclass(frozen=True)
class Layout:
    """One layout whose traffic is counted."""

    name: str
    degrees: Degrees
    world: int
    theory: Callable[[DecoderConfig], Bytes]
    options: ParallelOptions = field(default_factory=ParallelOptions)
    experts: bool = False
    microbatches: int = 1


def _fsdp(shape: DecoderConfig, *, copies: int = 1, apart: int = 0) -> Bytes:
    """Weights are gathered in forward and, in blocks, in backward; their gradients are scattered once.

    Args:
        shape: Of the model.
        copies: Each has its part of the gradients summed with the others'.
        apart: Parameters in blocks that are none of FSDP's, such as experts on ranks of their own.
    """
    whole = 4.0 * (titan_model.count_parameters(shape) - apart)
    blocks = whole - 4 * (2 * shape.vocab_size * shape.dim + shape.dim)
    bytes_ = {"all_gather": whole + blocks, "reduce_scatter": whole}
    return bytes_ if copies == 1 else bytes_ | {"all_reduce": whole / copies}


def _tensor(shape: DecoderConfig) -> Bytes:
    """Activations are B x S x D.

    Attention and feed-forward each gather and scatter them once forward and once backward, the embedding scatters and
    gathers, the head gathers and scatters. Summed over ranks are the gradients of norms, and for the loss over a split
    vocabulary the maximum, the sum of exponentials and the label's logit of each token.
    """
    tokens = shape.max_seq_len
    norms = 4.0 * (2 * shape.n_layers + 1) * shape.dim
    moved = 4.0 * tokens * shape.dim * (4 * shape.n_layers + 2)
    return {"all_gather": moved, "reduce_scatter": moved, "all_reduce": norms + 3 * 4 * tokens}


def _heads(shape: DecoderConfig, heads: int, tokens: int) -> float:
    """Return the bytes of so many heads of all layers, at so many tokens."""
    return 4.0 * shape.n_layers * heads * tokens * (shape.dim // shape.n_heads)


def _gathered(shape: DecoderConfig) -> Bytes:
    """Weights as under FSDP; keys and values of whole sequences are gathered, and their gradients scattered."""
    whole = _heads(shape, 2 * shape.n_kv_heads, shape.max_seq_len)
    weights = _fsdp(shape)
    return {kind: weights[kind] + whole for kind in ("all_gather", "reduce_scatter")}


def _ring(shape: DecoderConfig, ranks: int) -> Bytes:
    """A rank's keys and values go to each other rank, twice, and their gradients come back once."""
    part = _heads(shape, 2 * shape.n_kv_heads, shape.max_seq_len // ranks)
    return _fsdp(shape) | {"send": 3 * (ranks - 1) * part}


def _ulysses(shape: DecoderConfig, ranks: int) -> Bytes:
    """Queries, keys and values are exchanged for heads, and results back; in backward the same of gradients."""
    heads = 2 * shape.n_heads + 2 * shape.n_kv_heads
    return _fsdp(shape) | {"all_to_all": 2 * _heads(shape, heads, shape.max_seq_len // ranks)}


def _expert(shape: DecoderConfig) -> Bytes:
    """Each token goes to its experts and comes back, twice; each rank tells how many go to which expert."""
    assert shape.moe is not None
    apart = shape.n_layers * shape.moe.n_experts * 3 * shape.dim * shape.moe.ffn_dim
    rows = shape.max_seq_len * shape.moe.top_k
    exchanged = shape.n_layers * (4 * 4.0 * rows * shape.dim + 8 * shape.moe.n_experts)
    return _fsdp(shape, apart=apart) | {"all_to_all": exchanged}


def _pipeline(shape: DecoderConfig, ranks: int, microbatches: int) -> Bytes:
    """Between two stages go the hidden states of each microbatch and, back, their gradients."""
    return {"send": 2 * (ranks - 1) / ranks * microbatches * 4.0 * shape.max_seq_len * shape.dim}


LAYOUTS = [
    Layout("FSDP 2", Degrees(), 2, _fsdp),
    Layout("HSDP 2 x 2", Degrees(dp_replicate=2), 4, lambda shape: _fsdp(shape, copies=2)),
    Layout("TP 2 with sequence parallelism", Degrees(tp=2), 2, _tensor),
    Layout("CP 2, allgather", Degrees(cp=2), 2, _gathered),
    Layout("CP 4, ring", Degrees(cp=4), 4, lambda shape: _ring(shape, 4), ParallelOptions(context="ring")),
    Layout("CP 2, ulysses", Degrees(cp=2), 2, lambda shape: _ulysses(shape, 2), ParallelOptions(context="ulysses")),
    Layout("EP 2, 8 experts, 2 a token", Degrees(ep=2), 2, _expert, experts=True),
    Layout(
        "PP 2, 1F1B, 4 microbatches",
        Degrees(pp=2),
        2,
        lambda shape: _pipeline(shape, 2, 4),
        ParallelOptions(pipeline=PipelineOptions(schedule="1F1B")),
        microbatches=4,
    ),
]


def traffic_lines(layout: Layout, settings: Settings) -> str:
    """Return the rows of a table about one layout."""
    shape = replace(settings.shape, moe=EXPERTS) if layout.experts else settings.shape
    counted: Bytes = in_group(layout.world, _traffic, shape, layout.degrees, layout.options, layout.microbatches)
    expected = layout.theory(shape)
    return "\n".join(
        f"| {layout.name} | {kind} | {counted.get(kind, 0):,.0f} | {expected.get(kind, 0):,.0f} | "
        f"**{counted.get(kind, 0) / expected[kind] if kind in expected else float('inf'):.4f}** |"
        for kind in sorted(counted.keys() | expected.keys())
    )


def _traffic(shape: DecoderConfig, degrees: Degrees, options: ParallelOptions, microbatches: int) -> Bytes:
    model = laid_out(shape, degrees, options)
    microbatch, count = one_row(shape)
    # In their first step ranks see whether they agree, and stages what they exchange.
    model.forward_backward([microbatch] * microbatches, total_loss, count)
    with Traffic() as traffic:
        model.forward_backward([microbatch] * microbatches, total_loss, count)
    every: list[Counter[str]] = [Counter() for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, traffic.bytes)
    return {kind: sum(one[kind] for one in every) / len(every) for kind in traffic.bytes}


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of what passes through collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come through here one by one
        if func.namespace == "titan_parallel":  # operators made of Python functions, which collectives are called in
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        match str(func.overloadpacket):
            case "c10d._allgather_base_":
                self.bytes["all_gather"] += _bytes(args[0])
            case "c10d._reduce_scatter_base_":
                self.bytes["reduce_scatter"] += _bytes(args[1])
            case "c10d.allreduce_":
                self.bytes["all_reduce"] += sum(map(_bytes, args[0]))
            case "c10d.alltoall_base_":
                self.bytes["all_to_all"] += _bytes(args[1])
            case "c10d.send":
                self.bytes["send"] += sum(map(_bytes, args[0]))
            case "_c10d_functional.all_gather_into_tensor":
                self.bytes["all_gather"] += _bytes(args[0]) * args[1]
            case "_c10d_functional.reduce_scatter_tensor":
                self.bytes["reduce_scatter"] += _bytes(args[0])
            case "_c10d_functional.all_reduce":
                self.bytes["all_reduce"] += _bytes(args[0])
            case "_c10d_functional.all_to_all_single":
                self.bytes["all_to_all"] += _bytes(args[0])
            case name if name.startswith(("c10d.", "_c10d_functional.")):
                if name.rpartition(".")[2] not in _SILENT:
                    raise AssertionError(f"{name} is not counted")
        return func(*args, **(kwargs or {}))


_SILENT = ("wait_tensor", "_wrap_tensor_autograd", "recv_", "barrier", "monitored_barrier_")


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
