"""How to parallelize, apart from the layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

ActivationCheckpointing = Literal["none", "full", "selective"]
ContextKind = Literal["allgather", "ring", "ulysses"]


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Choices that change speed and memory, not what is learnt (but for the rounding of a lower precision).

    Attributes:
        param_dtype: Dtype in which forward and backward run; the parameters themselves, and the optimizer, keep
            their own. None computes in the parameters' dtype.
        reduce_dtype: Dtype in which gradients are summed over ranks when `param_dtype` is set.
        reshard_after_forward: Free each block's gathered weights after its forward and gather them again for its
            backward (less memory), or keep them (less communication).
        sequence_parallel: Under tensor parallelism, split the activations between blocks over the sequence.
        activation_checkpointing: `none` keeps all activations of a block for backward, `full` only its input (and
            computes the rest again), `selective` also the results of attention, of the grouped products of experts,
            of every second other matrix product and of the reduce-scatters of sequence parallelism.
        compile_blocks: Compile each block with torch.compile.
        compile_backend: Backend of torch.compile.
        context: Under context parallelism, how ranks attend to sequences of which each has a part: `allgather` gathers
            all keys and values, `ring` passes them from rank to rank, `ulysses` exchanges parts of the sequence for
            parts of the heads.
    """

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype = torch.float32
    reshard_after_forward: bool = True
    sequence_parallel: bool = True
    activation_checkpointing: ActivationCheckpointing = "none"
    compile_blocks: bool = False
    compile_backend: str = "inductor"
    context: ContextKind = "allgather"
