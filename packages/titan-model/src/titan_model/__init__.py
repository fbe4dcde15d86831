"""Decoder language models as plain PyTorch modules: configs, presets, initialisation, cost."""

from titan_model.config import DecoderConfig, RopeScaling
from titan_model.cost import count_parameters, flops_per_token
from titan_model.decoder import Decoder, build
from titan_model.generation import generate
from titan_model.initialisation import init_parameters
from titan_model.loss import cross_entropy_sum
from titan_model.plan import DecoderPlan, parallel_plan
from titan_model.presets import preset, preset_names

__all__ = [
    "Decoder",
    "DecoderConfig",
    "DecoderPlan",
    "RopeScaling",
    "build",
    "count_parameters",
    "cross_entropy_sum",
    "flops_per_token",
    "generate",
    "init_parameters",
    "parallel_plan",
    "preset",
    "preset_names",
]
