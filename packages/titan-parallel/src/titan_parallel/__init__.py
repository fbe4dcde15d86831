"""Parallel training of any nn.Module over a device mesh."""

from titan_parallel.apply import parallelize
from titan_parallel.clip_grad import clip_grad_norm
from titan_parallel.context.attention import context_attention
from titan_parallel.errors import LayoutError
from titan_parallel.mesh import MESH_DIMS, DataAxis, Degrees, build_mesh, data_axis
from titan_parallel.model import ParallelModel
from titan_parallel.options import Float8Options, ParallelOptions, PipelineOptions
from titan_parallel.pipeline.schedules import SCHEDULES, bubble_share, check_pipeline, choose_microbatches
from titan_parallel.plan import ParallelPlan, check_plan
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
