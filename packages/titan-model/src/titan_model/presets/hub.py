"""Names of released models on Hugging Face's Hub, and the preset that has their shape."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

HUB: Mapping[str, str] = MappingProxyType(
    {
        "meta-llama/Llama-2-7b-hf": "llama2_7b",
        "meta-llama/Llama-2-13b-hf": "llama2_13b",
        "meta-llama/Llama-2-70b-hf": "llama2_70b",
        "meta-llama/Meta-Llama-3-8B": "llama3_8b",
        "meta-llama/Meta-Llama-3-70B": "llama3_70b",
        "meta-llama/Llama-3.1-8B": "llama3_1_8b",
        "meta-llama/Llama-3.1-70B": "llama3_1_70b",
        "meta-llama/Llama-3.1-405B": "llama3_1_405b",
        "meta-llama/Llama-3.2-1B": "llama3_2_1b",
        "meta-llama/Llama-3.2-3B": "llama3_2_3b",
        "Qwen/Qwen2.5-0.5B": "qwen2_5_0_5b",
        "Qwen/Qwen2.5-1.5B-Instruct": "qwen2_5_1_5b",
        "Qwen/Qwen2.5-3B": "qwen2_5_3b",
        "Qwen/Qwen2.5-7B-Instruct": "qwen2_5_7b",
        "Qwen/Qwen2.5-14B-Instruct": "qwen2_5_14b",
        "Qwen/Qwen2.5-32B-Instruct": "qwen2_5_32b",
        "Qwen/Qwen2.5-72B-Instruct": "qwen2_5_72b",
        "Qwen/Qwen3-0.6B": "qwen3_0_6b",
        "Qwen/Qwen3-1.7B": "qwen3_1_7b",
        "Qwen/Qwen3-4B": "qwen3_4b",
        "Qwen/Qwen3-8B": "qwen3_8b",
        "Qwen/Qwen3-14B": "qwen3_14b",
        "Qwen/Qwen3-32B": "qwen3_32b",
        "Qwen/Qwen3-30B-A3B": "qwen3_30b_a3b",
        "Qwen/Qwen3-235B-A22B": "qwen3_235b_a22b",
        "mistralai/Mistral-7B-v0.1": "mistral_7b_v0_1",
        "mistralai/Mistral-7B-v0.3": "mistral_7b_v0_3",
        "mistralai/Mistral-Nemo-Base-2407": "mistral_nemo_12b",
        "mistralai/Mistral-Small-24B-Base-2501": "mistral_small_24b",
        "mistralai/Mixtral-8x7B-v0.1": "mixtral_8x7b",
        "mistralai/Mixtral-8x22B-v0.1": "mixtral_8x22b",
        "01-ai/Yi-6B": "yi_6b",
        "01-ai/Yi-34B": "yi_34b",
        "HuggingFaceTB/SmolLM2-135M": "smollm2_135m",
        "HuggingFaceTB/SmolLM2-360M": "smollm2_360m",
        "HuggingFaceTB/SmolLM2-1.7B": "smollm2_1_7b",
        "HuggingFaceTB/SmolLM3-3B": "smollm3_3b",
        "ibm-granite/granite-3.3-2b-instruct": "granite_3_3_2b",
        "ibm-granite/granite-3.3-8b-instruct": "granite_3_3_8b",
        "microsoft/Phi-3-mini-4k-instruct": "phi3_mini_4k",
        "microsoft/Phi-3-medium-4k-instruct": "phi3_medium_4k",
        "microsoft/phi-4": "phi4",
        "microsoft/Phi-4-mini-instruct": "phi4_mini",
    }
)
