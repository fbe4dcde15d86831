"""Models of another library in pipelines, as they come: tied heads, two tables, a loss of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallel_cases import full_state
from parallel_mesh import cpu_mesh
from parallel_transformers import EPS, ROWS, SEQ, STEPS, VOCAB, batch, summed_loss
from titan_parallel import (
    Degrees,
    Microbatch,
    ParallelOptions,
    ParallelPlan,
    PipelineOptions,
    data_axis,
    parallelize,
)

LAYERS = 4

PLANS: dict[str, ParallelPlan] = {
    "Llama": {
        "blocks": ["model.layers.*"],
        "before": ["model.embed_tokens"],
        "after": ["model.norm", "lm_head"],
        "tied": [("lm_head.weight", "model.embed_tokens.weight")],
    },
    "GPT2": {
        "blocks": ["transformer.h.*"],
        "before": ["transformer.wte", "transformer.wpe"],
        "after": ["transformer.ln_f", "lm_head"],
        "tied": [("lm_head.weight", "transformer.wte.weight")],
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "Llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": SEQ,
    },
    "GPT2": {
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": SEQ,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}
NAMES = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}


def build(family: str) -> nn.Module:
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        initializer_range=0.2,
        use_cache=False,
        attn_implementation="sdpa",
        **SHAPES[family],
    )
    model: nn.Module = getattr(transformers, NAMES[family])(config)
    return model


def train(family: str, degrees: Degrees, schedule: str) -> tuple[list[float], Any, Tensor]:
    options = ParallelOptions(pipeline=PipelineOptions(schedule=schedule))
    model = parallelize(build(family), cpu_mesh(degrees), PLANS[family], options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    place = data_axis(model.mesh)
    losses = []
    for step in range(STEPS):
        mine = (x.chunk(place.dp_world_size)[place.dp_rank].chunk(4) for x in batch(step))
        # Labels make the model take its own loss, of the head's output, which is on the last stage alone.
        step_of = [Microbatch((t,), y, {"labels": y}) for t, y in zip(*mine, strict=True)]
        part = model.forward_backward(step_of, summed_loss, ROWS * SEQ)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    return losses, full_state(model), model.predict(batch(0)[0]).logits
