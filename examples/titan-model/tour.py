# From packages/titan-model/README.md; written by tools/examples.py.

# Use

import torch
from titan_model import SamplingParams, build, count_parameters, flops_per_token, generate, init_parameters, preset

config = preset("debug")
model = build(config)
init_parameters(model.named_parameters(), config, seed=0)

tokens = torch.randint(0, config.vocab_size, (4, 65), generator=torch.Generator().manual_seed(0))
inputs, labels = tokens[:, :-1], tokens[:, 1:]  # labels are shifted here; -100 is not scored
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for step in range(30):
    loss = model(inputs, labels=labels).total / labels.numel()  # never holds all logits; without labels: logits
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if step % 10 == 0:
        print(f"step {step}  loss {losses[-1]:.3f}")
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

prompts = [tokens[0, :16].tolist(), tokens[1, :9].tolist()]  # any lengths
greedy = SamplingParams(temperature=0)  # also top_k, top_p, seed
print(generate(model, prompts, greedy, max_new_tokens=8))  # also stop
print(f"{count_parameters(config):,} parameters, {flops_per_token(config, 64):.3g} FLOPs per trained token")

# Use

import tempfile
from pathlib import Path

import torch
from titan_model import build, init_parameters, preset, save_huggingface

config = preset("debug_qwen3")
model = build(config)
init_parameters(model.named_parameters(), config, seed=0)
folder = Path(tempfile.mkdtemp()) / "my-qwen3"
save_huggingface(model, folder, dtype=torch.bfloat16)
print(sorted(path.name for path in folder.iterdir()))  # ['config.json', 'model.safetensors']

# Use

from titan_model import load_huggingface

model = load_huggingface(folder)  # device="cuda", dtype=torch.float32, ...
print(model.config.qk_norm, model.embed.weight.dtype)  # True torch.bfloat16
padded = load_huggingface(folder, vocab_size=320, attention="sdpa")  # also max_seq_len, balance_loss, ...
print(padded.head.weight.shape)  # torch.Size([320, 256])

# Use

from dataclasses import replace

import torch
from titan_model import balance_experts, build, init_parameters, preset, set_num_target_tokens

config = preset("debug_moe")
config = replace(config, moe=replace(config.moe, balance_bias_rate=1e-3))
model = build(config)
init_parameters(model.named_parameters(), config, seed=0)
tokens = torch.randint(0, config.vocab_size, (2, 64))
set_num_target_tokens(model, tokens.numel())
(model(tokens, labels=tokens).total / tokens.numel()).backward()
print(balance_experts(model))  # updates the biases; returns the largest load, the fraction of idle experts, ...
