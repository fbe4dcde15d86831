"""Decoder language models as plain PyTorch modules: families, weights in and out, initialisation, loss, cost."""

from titan_model.config import DecoderConfig, MoEConfig, RopeScaling
from titan_model.convert.errors import WeightsError
from titan_model.convert.huggingface_config import config_from_huggingface, config_to_huggingface
from titan_model.convert.huggingface_files import load_huggingface, save_huggingface
from titan_model.convert.huggingface_names import huggingface_map
from titan_model.convert.meta_llama import load_meta, meta_map
from titan_model.convert.weight_map import WeightMap
from titan_model.cost import count_active_parameters, count_parameters, flops_per_token
from titan_model.decoder import Decoder, build
from titan_model.generation.generate import generate
from titan_model.generation.sampling import sample
from titan_model.init import init_parameters
from titan_model.layers.kv_cache import KVCache
from titan_model.loss import LossSums, linear_cross_entropy
from titan_model.moe.load_balancing import EXPERT_FIGURES, balance_experts, set_loss_normaliser, set_sequence_sum
from titan_model.moe.router import Router
from titan_model.plan import DecoderPlan, parallel_plan
from titan_model.presets import preset, preset_names

__all__ = [
    "EXPERT_FIGURES",
    "Decoder",
    "DecoderConfig",
    "DecoderPlan",
    "KVCache",
    "LossSums",
    "MoEConfig",
    "RopeScaling",
    "Router",
    "WeightMap",
    "WeightsError",
    "balance_experts",
    "build",
    "config_from_huggingface",
    "config_to_huggingface",
    "count_active_parameters",
    "count_parameters",
    "flops_per_token",
    "generate",
    "huggingface_map",
    "init_parameters",
    "linear_cross_entropy",
    "load_huggingface",
    "load_meta",
    "meta_map",
    "parallel_plan",
    "preset",
    "preset_names",
    "sample",
    "save_huggingface",
    "set_loss_normaliser",
    "set_sequence_sum",
]
