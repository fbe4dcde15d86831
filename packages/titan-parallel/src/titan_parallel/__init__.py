"""Parallel training of any nn.Module over a device mesh, from one plan.

What happens to a model (`apply.parallelize`), and what happens in a step (`ParallelModel.forward_backward`):

    Degrees --- build_mesh ---> DeviceMesh (mesh)        ParallelPlan (plan)      ParallelOptions (options)
                                     |                          |                          |
                                     +----- check: do they fit? agreement: on all ranks? --+
                                                                |
        model ---------> context     replace attention, cut sequences         cp
                         float8      convert linears
                         tensor      split weights; hooks communicate         tp
                         expert      distribute experts; rows travel          ep
                         activation_checkpoint, compile   each block
                         fsdp        shard each block                         dp_shard, dp_replicate
                         pipeline    cut into stages first, then all of the above for each stage    pp
                                                                |
                                                          ParallelModel (model)
                                                                |
        microbatches --> step                do all ranks make the same call? did a loss fail?
                         context.inputs      this rank's part of each sequence
                         sequential          forward, loss, backward, one microbatch after the other
                         or pipeline.run     the same through stages, by one of torch's schedules
                         random_streams, autocast    what random numbers and casts of weights a step uses
                         clip_grad           norm and clipping over every mesh dim

`_torch_compat` holds every private torch API in use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titan_parallel.apply import parallelize
    from titan_parallel.check import check_plan
    from titan_parallel.clip_grad import clip_grad_norm
    from titan_parallel.context.attention import context_attention
    from titan_parallel.degrees import MESH_DIMS, Degrees
    from titan_parallel.errors import LayoutError
    from titan_parallel.mesh import DataAxis, build_mesh, data_axis
    from titan_parallel.model import ParallelModel
    from titan_parallel.options import Float8Options, ParallelOptions, PipelineOptions
    from titan_parallel.pipeline.schedules import SCHEDULES, bubble_share, check_pipeline, choose_microbatches
    from titan_parallel.plan import ParallelPlan
    from titan_parallel.sequential import Microbatch
    from titan_parallel.transformers_plan import plan_from_transformers

__all__ = [
    "MESH_DIMS",
    "SCHEDULES",
    "DataAxis",
    "Degrees",
    "Float8Options",
    "LayoutError",
    "Microbatch",
    "ParallelModel",
    "ParallelOptions",
    "ParallelPlan",
    "PipelineOptions",
    "bubble_share",
    "build_mesh",
    "check_pipeline",
    "check_plan",
    "choose_microbatches",
    "clip_grad_norm",
    "context_attention",
    "data_axis",
    "parallelize",
    "plan_from_transformers",
]

# Lazy exports: importing torch takes seconds, and is not needed to read the fields of `Degrees` and the options.
_MODULES = {
    "parallelize": "titan_parallel.apply",
    "check_plan": "titan_parallel.check",
    "clip_grad_norm": "titan_parallel.clip_grad",
    "context_attention": "titan_parallel.context.attention",
    "MESH_DIMS": "titan_parallel.degrees",
    "Degrees": "titan_parallel.degrees",
    "LayoutError": "titan_parallel.errors",
    "DataAxis": "titan_parallel.mesh",
    "build_mesh": "titan_parallel.mesh",
    "data_axis": "titan_parallel.mesh",
    "ParallelModel": "titan_parallel.model",
    "Float8Options": "titan_parallel.options",
    "ParallelOptions": "titan_parallel.options",
    "PipelineOptions": "titan_parallel.options",
    "SCHEDULES": "titan_parallel.pipeline.schedules",
    "bubble_share": "titan_parallel.pipeline.schedules",
    "check_pipeline": "titan_parallel.pipeline.schedules",
    "choose_microbatches": "titan_parallel.pipeline.schedules",
    "ParallelPlan": "titan_parallel.plan",
    "Microbatch": "titan_parallel.sequential",
    "plan_from_transformers": "titan_parallel.transformers_plan",
}

if not TYPE_CHECKING:  # for type checkers every name would exist

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
