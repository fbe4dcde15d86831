"""Decoder language models as regular PyTorch modules: configs, presets, weight conversion, initialization, loss, cost.

How the parts fit together:

    preset name     config.json                  Hugging Face or Meta files      seed
         |               |                                    |                    |
      presets     convert (config)                    convert (weights)          init
         |               |                                    |                    |
         +-------+-------+                                    +---------+----------+
                 v                                                      v
           DecoderConfig ------> decoder.build (layers, moe) -------> Decoder
                 |                                                      |
            cost, plan                         tokens ---> logits ------+---> generation ---> token ids
                                      tokens + labels ---> loss --------+---> backward ---> moe.load_balancing
                                                                        +---> convert ---> Hugging Face files

The modules know nothing about ranks or device meshes; `plan` describes how they may be split. `token_ids` checks what
data gives them, and `_torch_compat` holds every private PyTorch function in use.
"""

from titan_model.companions import Companions
from titan_model.config import DecoderConfig, MoEConfig
from titan_model.convert.errors import WeightsError
from titan_model.convert.huggingface_config import config_from_huggingface, config_to_huggingface
from titan_model.convert.huggingface_files import load_huggingface, save_huggingface
from titan_model.convert.huggingface_names import huggingface_map
from titan_model.convert.load_changes import LoadChanges
from titan_model.convert.meta_llama import load_meta, meta_map
from titan_model.convert.weight_map import DecoderWeightMap
from titan_model.cost import count_active_parameters, count_parameters, flops_per_token
from titan_model.decoder import Decoder, build
from titan_model.generation.generate import generate
from titan_model.generation.sampling import SamplingParams, sample
from titan_model.init import init_parameters
from titan_model.layers.kv_cache import KVCache
from titan_model.loss import LossSums, linear_cross_entropy
from titan_model.moe.load_balancing import EXPERT_METRICS, balance_experts, set_num_target_tokens, set_sequence_sum
from titan_model.moe.router import Router
from titan_model.plan import DecoderPlan, parallel_plan
from titan_model.presets import preset, preset_names
from titan_model.rope_scalings import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    rope_scaling,
)

__all__ = [
    "EXPERT_METRICS",
    "Companions",
    "Decoder",
    "DecoderConfig",
    "DecoderPlan",
    "DecoderWeightMap",
    "DynamicScaling",
    "KVCache",
    "LinearScaling",
    "Llama3Scaling",
    "LoadChanges",
    "LongRopeScaling",
    "LossSums",
    "MoEConfig",
    "RopeScaling",
    "Router",
    "SamplingParams",
    "WeightsError",
    "YarnScaling",
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
    "rope_scaling",
    "sample",
    "save_huggingface",
    "set_num_target_tokens",
    "set_sequence_sum",
]
