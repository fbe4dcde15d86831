"""Models of another library, under titan-parallel as they come."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel_cases import full_state
from parallel_mesh import cpu_mesh
from titan_parallel import Degrees, Microbatch, ParallelOptions, ParallelPlan, data_axis, parallelize

VOCAB, ROWS, SEQ, STEPS = 64, 8, 16, 3
EPS = 1e-5  # well above rounding, which Adam would blow up where a gradient is next to nothing

LLAMA: ParallelPlan = {
    "blocks": ["model.layers.*"],
    "before": ["model.embed_tokens"],
    "after": ["model.norm", "lm_head"],
    "tensor": {
        "model.embed_tokens": "vocab",
        "model.layers.*.*_layernorm": "sequence",
        "model.layers.*.self_attn": "gather",
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp": "gather",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "model.norm": "sequence",
        "lm_head": "logits",
    },
    "divisible": {"key/value heads": 2, "vocabulary": VOCAB},
}

# A Qwen3 is a Llama whose heads are normed, and are of a width of their own.
QWEN3: ParallelPlan = {
    **LLAMA,
    "tensor": {
        **LLAMA["tensor"],
        "model.layers.*.self_attn.q_norm": "local",
        "model.layers.*.self_attn.k_norm": "local",
    },
}
PLANS = {"Llama": LLAMA, "Qwen3": QWEN3}


def build(family: str) -> nn.Module:
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQ,
        tie_word_embeddings=False,
        initializer_range=0.2,
        use_cache=False,
        attn_implementation="sdpa",
        **({"head_dim": 16} if family == "Qwen3" else {}),
    )
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(step))
    return tokens, (tokens * 5 + 2) % VOCAB


def summed_loss(output: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum")


def reference(model: nn.Module) -> tuple[list[float], dict[str, Tensor]]:
    """Train in one process with nothing but torch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    losses = []
    for step in range(STEPS):
        tokens, labels = batch(step)
        loss = summed_loss(model(tokens), labels) / labels.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def train(family: str, degrees: Degrees, options: ParallelOptions) -> tuple[list[float], dict[str, Tensor], Tensor]:
    model = parallelize(build(family), cpu_mesh(degrees), PLANS[family], options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=EPS)
    place = data_axis(model.mesh)
    losses = []
    for step in range(STEPS):
        tokens, labels = (x.chunk(place.dp_world_size)[place.dp_rank] for x in batch(step))
        part = model.forward_backward([Microbatch((tokens,), labels)], summed_loss, ROWS * SEQ)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(model.sum_parts(part)))
    return losses, full_state(model), model.predict(batch(0)[0]).logits
