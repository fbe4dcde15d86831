"""Models of another library in pipelines, as they come: tied heads, two tables, a loss of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_cases import whole
from titan_parallel import (
    Degrees,
    Microbatch,
    ParallelOptions,
    ParallelPlan,
    PipelineOptions,
    build_mesh,
    data_axis,
    parallelize,
)

VOCAB, ROWS, SEQ, STEPS, LAYERS = 64, 8, 16, 5, 4

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


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(step))
    return tokens, (tokens * 5 + 2) % VOCAB


def loss_of(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")


def reference(family: str) -> tuple[list[float], dict[str, Tensor], Tensor]:
    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    losses = []
    for step in range(STEPS):
        tokens, labels = batch(step)
        loss = loss_of(model(tokens), labels) / labels.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}, model(batch(0)[0]).logits.detach()


def train(rank: int, world: int, family: str, degrees: Degrees, schedule: str) -> tuple[list[float], Any, Tensor]:
    options = ParallelOptions(pipeline=PipelineOptions(schedule=schedule))
    model = parallelize(build(family), build_mesh(degrees, "cpu"), PLANS[family], options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    place = data_axis(model.mesh)
    losses = []
    for step in range(STEPS):
        mine = (x.chunk(place.world)[place.rank].chunk(4) for x in batch(step))
        # Labels make the model take its own loss, of the head's output, which is on the last stage alone.
        step_of = [Microbatch((t,), y, {"labels": y}) for t, y in zip(*mine, strict=True)]
        part = model.forward_backward(step_of, loss_of, ROWS * SEQ)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    return losses, whole(model), model.predict(batch(0)[0]).logits
