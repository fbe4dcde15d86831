"""How to parallelize, apart from the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from titan_parallel.errors import LayoutError
from titan_parallel.mesh import Degrees

ActivationCheckpointing = Literal["none", "full", "selective", "budget"]
ContextKind = Literal["allgather", "ring", "ulysses"]
Reshard = Literal["default", "always", "never"]
Float8Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]


@dataclass(frozen=True, kw_only=True)
class Float8Options:
    """How the linears within blocks multiply in float8. What runs before and after the blocks does not.

    Attributes:
        recipe: One scale for each tensor (`tensorwise`, the fastest), for each row (`rowwise`, the more exact), or for
            each row and the gradients of weights in the dtype of the others (`rowwise_with_gw_hp`). On a GPU the last
            two want `param_dtype` to be `torch.bfloat16`.
        fsdp_all_gather: Let FSDP2 gather weights in float8, at a quarter or half of the traffic; `tensorwise` only.
        skip: Patterns of modules that stay as they are, themselves and what is in them.
        emulate: Round to float8, but multiply in the dtype of the others: on any device, no faster, for tests.
    """

    recipe: Float8Recipe = "tensorwise"
    fsdp_all_gather: bool = False
    skip: Sequence[str] = ()
    emulate: bool = False


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How pipeline parallelism splits the blocks into stages, and in which order these run.

    Attributes:
        schedule: One of `SCHEDULES`, or the path of a file that ends in `.csv`: a row for each rank, a cell for each
            of its actions in their order, such as `0F3`: stage 0 runs the forward of microbatch 3. The other kinds are
            `B` (backward), or `I` and `W` for the two halves of one (gradients of inputs, of weights).
        stages_per_rank: None is 1 for GPipe and 1F1B, what a file says, and 2 for the others.
        split: Names of the blocks that begin a stage, without the first. Empty: stages are balanced by what their
            blocks compute.
        first_stage_less: For balancing: how many blocks' work the modules before the blocks stand for. None counts
            their parameters, but for embedding tables, which are only looked up in.
        last_stage_less: The same for the modules after the blocks.
    """

    schedule: str = "1F1B"
    stages_per_rank: int | None = None
    split: tuple[str, ...] = ()
    first_stage_less: float | None = None
    last_stage_less: float | None = None


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Choices that change speed and memory, not what is learnt (but for the rounding of a lower precision).

    Attributes:
        param_dtype: Dtype in which forward and backward run; the parameters themselves, and the optimizer, keep
            their own. None computes in the parameters' dtype.
        reduce_dtype: Dtype in which gradients are summed over ranks when `param_dtype` is set.
        reshard_after_forward: Whether to free each block's gathered weights after its forward and gather them again
            for its backward: `always` (less memory), `never` (less communication), or a number of ranks, such as those
            of one host, over which they stay sharded between the two. `default` is `always`, but under pipeline
            parallelism, where each microbatch would gather them twice, `never`.
        reduce_every_microbatch: Sum gradients over the shards after each microbatch, so that a rank holds those of its
            own shard only. If not, whole gradients are kept until the last microbatch of a step and summed once: less
            communication when accumulating, and memory for a whole copy of them.
        cpu_offload: Keep parameters, gradients and optimizer state in host memory, and bring each block's weights to
            the device for its forward and backward. The optimizer then runs on the CPU.
        sequence_parallel: Under tensor parallelism, split the activations between blocks over the sequence.
        async_tp: Under tensor parallelism, let the compiler overlap the collectives of the sequence with the matrix
            products next to them. Needs CUDA, compilation by inductor and `sequence_parallel`. It relies on torch's
            symmetric memory, which no CPU has, so that the tests check its refusals and settings only.
        activation_checkpointing: `none` keeps all activations of a block for backward, `full` only its input (and
            computes the rest again), `selective` also the results of attention, of the grouped products of experts,
            of every second other matrix product, of the reduce-scatters of sequence parallelism, and of `save_ops`.
            `budget` leaves the choice to the compiler, within `memory_budget`.
        checkpoint_every: Checkpoint the first of so many blocks each, and let the others keep all.
        save_ops: Operators whose results `selective` keeps too, named as torch does: `aten.mm`.
        memory_budget: For `budget`: the share, 0 to 1, of the memory that compiled blocks would take without any
            checkpointing; 0 is as `full`.
        compile_blocks: Compile each block with torch.compile.
        compile_backend: Backend of torch.compile.
        float8: Multiply in float8, by torchao; None does not.
        context: Under context parallelism, how ranks attend to sequences of which each has a part: `allgather` gathers
            all keys and values, `ring` passes them from rank to rank, `ulysses` exchanges parts of the sequence for
            parts of the heads.
        pipeline: Stages and schedule, where `pp` is more than 1.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype = torch.float32
    reshard_after_forward: Reshard | int = "default"
    reduce_every_microbatch: bool = True
    cpu_offload: bool = False
    sequence_parallel: bool = True
    async_tp: bool = False
    activation_checkpointing: ActivationCheckpointing = "none"
    checkpoint_every: int = 1
    save_ops: Sequence[str] = ()
    memory_budget: float | None = None
    compile_blocks: bool = False
    compile_backend: str = "inductor"
    float8: Float8Options | None = None
    context: ContextKind = "allgather"
    pipeline: PipelineOptions = PipelineOptions()


def check_options(options: ParallelOptions, degrees: Degrees) -> None:
    """Check that options agree with one another and with the layout.

    Args:
        options: The choices.
        degrees: The layout; a `dp_shard` of -1 passes for anything.

    Raises:
        LayoutError: With all that does not fit, and what to change.
    """
    wrong = [
        *_checkpointing(options),
        *_resharding(options, degrees),
        *_overlap(options, degrees),
        *_float8(options.float8),
    ]
    if wrong:
        raise LayoutError("; ".join(wrong))


def reshard_blocks(options: ParallelOptions, pp: int) -> bool | int:
    """Return what to do with a block's gathered weights after its forward, in FSDP2's terms.

    Args:
        options: Asks for something, or leaves it to the case.
        pp: Degree of pipeline parallelism.

    Returns:
        Whether to free them, or over how many ranks to shard them.
    """
    if isinstance(options.reshard_after_forward, int):
        return options.reshard_after_forward
    return {"default": pp == 1, "always": True, "never": False}[options.reshard_after_forward]


def _checkpointing(options: ParallelOptions) -> list[str]:
    mode, budget, wrong = options.activation_checkpointing, options.memory_budget, []
    if mode not in get_args(ActivationCheckpointing):
        wrong.append(f"activation_checkpointing {mode!r} is none of {list(get_args(ActivationCheckpointing))}")
    if options.checkpoint_every < 1:
        wrong.append(f"checkpoint_every is {options.checkpoint_every}; it has to be at least 1")
    elif options.checkpoint_every > 1 and mode not in ("full", "selective"):
        wrong.append(f"checkpoint_every goes with activation_checkpointing 'full' or 'selective', not {mode!r}")
    if options.save_ops and mode != "selective":
        wrong.append(f"save_ops go with activation_checkpointing 'selective', not {mode!r}")
    if (mode == "budget") != (budget is not None):
        wrong.append(f"activation_checkpointing is {mode!r} and memory_budget {budget}: set both or none of them")
    if budget is not None and not 0 <= budget <= 1:
        wrong.append(f"memory_budget is {budget}; it is a share, from 0 to 1")
    if mode == "budget" and not options.compile_blocks:
        wrong.append("activation_checkpointing 'budget' is the compiler's: set compile_blocks too")
    return wrong


def _resharding(options: ParallelOptions, degrees: Degrees) -> list[str]:
    asked = options.reshard_after_forward
    if isinstance(asked, str):
        known = get_args(Reshard)
        return [] if asked in known else [f"reshard_after_forward {asked!r} is none of {[*known, 'a number of ranks']}"]
    if isinstance(asked, bool):
        return [f"reshard_after_forward is {asked}; say {'always' if asked else 'never'!r}"]
    if degrees.dp_shard < 0:
        return []
    ranks = degrees.dp_shard * degrees.cp * degrees.ep
    fits = [n for n in range(2, ranks) if ranks % n == 0]
    if asked in fits:
        return []
    return [
        f"reshard_after_forward {asked} is no way to share {ranks} ranks (dp_shard x cp x ep); "
        f"these numbers would be: {fits}; or 'always' or 'never'"
    ]


def _overlap(options: ParallelOptions, degrees: Degrees) -> list[str]:
    if not options.async_tp:
        return []
    needs = {
        "tp above 1": degrees.tp > 1,
        "sequence_parallel": options.sequence_parallel,
        "compile_blocks": options.compile_blocks,
        "compile_backend 'inductor'": options.compile_backend == "inductor",
    }
    missing = [need for need, there in needs.items() if not there]
    return [f"async_tp needs {', '.join(missing)}"] if missing else []


def _float8(options: Float8Options | None) -> list[str]:
    if options is None:
        return []
    if options.recipe not in get_args(Float8Recipe):
        return [f"float8 recipe {options.recipe!r} is none of {list(get_args(Float8Recipe))}"]
    if options.fsdp_all_gather and options.recipe != "tensorwise":
        return [
            f"float8 weights can be gathered under recipe 'tensorwise', not {options.recipe!r}: unset fsdp_all_gather"
        ]
    return []
