"""How to parallelize, apart from the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

ActivationCheckpointing = Literal["none", "full", "selective"]


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
        reshard_after_forward: Free each block's gathered weights after its forward and gather them again for its
            backward (less memory), or keep them (less communication). None frees them, but keeps them in a pipeline,
            where every microbatch would gather them anew.
        sequence_parallel: Under tensor parallelism, split the activations between blocks over the sequence.
        activation_checkpointing: `none` keeps all activations of a block for backward, `full` only its input (and
            computes the rest again), `selective` also the results of attention, of the grouped products of experts,
            of every second other matrix product and of the reduce-scatters of sequence parallelism.
        compile_blocks: Compile each block with torch.compile.
        compile_backend: Backend of torch.compile.
        pipeline: Stages and schedule, where `pp` is more than 1.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool | None = None
    sequence_parallel: bool = True
    activation_checkpointing: ActivationCheckpointing = "none"
    compile_blocks: bool = False
    compile_backend: str = "inductor"
    pipeline: PipelineOptions = PipelineOptions()
