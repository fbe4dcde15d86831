# From packages/titan-ckpt/README.md; written by tools/examples.py.

import shlex
import subprocess

# Interrupt and resume a run

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from titan_ckpt import Checkpointer


class OptimizerState:
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self):
        return get_optimizer_state_dict(self.model, self.optimizer, options=self.options)

    def load_state_dict(self, state):
        set_optimizer_state_dict(self.model, self.optimizer, state, options=self.options)


class Progress:
    step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def run(directory, last_step):
    """Train up to `last_step`, from the newest checkpoint if there is one; return the loss of each step."""
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    progress = Progress()
    state = {"model": model, "optimizer": OptimizerState(model, optimizer), "progress": progress}

    ckpt = Checkpointer(directory, keep_last=3, asynchronous=True)
    found = ckpt.load(state)
    if found is not None:
        print(f"resuming from step {found.step} ({found.metadata['note']})")

    losses = {}
    while progress.step < last_step:
        data = torch.randn(16, 8, generator=torch.Generator().manual_seed(progress.step))
        loss = (model(data) - data.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        losses[progress.step] = loss.item()
        if progress.step % 10 == 0:
            ckpt.save(progress.step, state, metadata={"note": "an example"})
    ckpt.close()  # waits for the last save
    return losses


torch.manual_seed(0)
uninterrupted = run("uninterrupted/checkpoints", last_step=40)

torch.manual_seed(0)
run("interrupted/checkpoints", last_step=27)  # the machine fails here: steps 21 to 27 are lost
torch.manual_seed(1)  # other initial weights, to show that they are loaded
resumed = run("interrupted/checkpoints", last_step=40)

assert list(resumed) == list(range(21, 41))
assert all(resumed[step] == uninterrupted[step] for step in resumed)
print("the resumed run has the same losses")

# The same under FSDP2

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


class ModelState:
    def __init__(self, model):
        self.model = model

    def state_dict(self):
        return get_model_state_dict(self.model)

    def load_state_dict(self, state):
        set_model_state_dict(self.model, state)


def run_sharded(directory, last_step):
    """Train a sharded model up to `last_step`; return the sum of its weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    progress = Progress()
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer), "progress": progress}

    ckpt = Checkpointer(directory, keep_last=3, asynchronous=True)
    ckpt.load(state)
    while progress.step < last_step:
        data = torch.randn(16, 8, generator=torch.Generator().manual_seed(progress.step))
        (model(data) - data.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
    ckpt.save(progress.step, state)
    ckpt.close()
    return sum(weight.full_tensor().sum().item() for weight in model.parameters())

# The same under FSDP2

import os

os.environ.setdefault("MASTER_ADDR", "localhost")  # torchrun sets all four
os.environ.setdefault("MASTER_PORT", "29511")
dist.init_process_group("gloo", rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1)))

run_sharded("sharded/checkpoints", last_step=5)
resumed = run_sharded("sharded/checkpoints", last_step=8)
assert abs(resumed - run_sharded("sharded/uninterrupted", last_step=8)) < 1e-6
dist.barrier()  # or a rank may exit while gloo's threads still use its tensors
dist.destroy_process_group()

# Inspect, read and load partially

from titan_ckpt import list_checkpoints, open_checkpoint, verify

for info in list_checkpoints("interrupted/checkpoints"):
    problems = verify(info.path, level="checksum")
    print(info.step, info.metadata, info.manifest.nbytes, "valid" if not problems else problems)

with open_checkpoint("interrupted/checkpoints/step-00000040") as opened:
    print(opened.values["progress"], {name: spec.shape for name, spec in opened.tensors.items()})
    weight = opened.read("model/weight")
    corner = opened.read_slice("model/weight", offsets=(0, 2), sizes=(1, 3))
assert torch.equal(corner, weight[:, 2:5])

# Inspect, read and load partially

model = torch.nn.Linear(8, 1, dtype=torch.bfloat16)
ckpt = Checkpointer("interrupted/checkpoints")
found = ckpt.load({"model": model}, only=["model/w*"], cast=True)
assert torch.equal(model.weight, weight.bfloat16())

larger = torch.nn.ModuleDict({"head": torch.nn.Linear(8, 1)})
larger.weight, larger.bias = torch.nn.Parameter(torch.zeros(1, 8)), torch.nn.Parameter(torch.ones(1))
found = ckpt.load({"model": larger}, frozen=["model/bias"], strict=False)
assert found.missing == ("model/head.bias", "model/head.weight")
assert torch.equal(larger.weight, weight)
assert larger.bias.item() == 1.0

# Go back to an earlier step

from titan_ckpt import restore


def steps(directory):
    return [info.step for info in list_checkpoints(directory)]


progress = Progress()
with Checkpointer("rewound/checkpoints") as ckpt:
    for progress.step in (10, 20, 30):
        ckpt.save(progress.step, {"progress": progress})

with Checkpointer("rewound/checkpoints") as ckpt:
    ckpt.load({"progress": progress}, step=10)
    progress.step = 15
    ckpt.save(15, {"progress": progress})  # sets steps 20 and 30 aside
assert steps("rewound/checkpoints") == [10, 15]

restore("rewound/checkpoints", 30)  # as `titan-ckpt restore rewound/checkpoints 30`: sets step 15 aside
assert steps("rewound/checkpoints") == [10, 20, 30]

# Retention

from titan_ckpt import KeepBest, Retention, pin, plan_prune

ckpt = Checkpointer("kept/checkpoints", keep_last=2, keep_every=100, keep_best=KeepBest("val_loss"))
for step, loss in {50: 2.0, 100: 3.0, 150: 4.0, 200: 3.5, 250: 3.4}.items():
    ckpt.save(step, {"progress": Progress()}, metrics={"val_loss": loss}, metadata={"tokens_seen": 4096 * step})
ckpt.close()
assert [info.step for info in list_checkpoints("kept/checkpoints")] == [50, 100, 200, 250]

pin("kept/checkpoints", 100, "before-the-spike")
plan = plan_prune("kept/checkpoints", Retention(keep_last=1))  # only a plan: nothing is deleted
assert list(plan.remove) == ["step-00000050", "step-00000200"]

# Object stores

ckpt = Checkpointer("memory://run/checkpoints", keep_last=2, asynchronous=True)
ckpt.save(1, {"progress": Progress()})
ckpt.close()
assert list_checkpoints("memory://run/checkpoints")[0].step == 1

# Hugging Face and other formats

from titan_ckpt import HuggingFaceExport, export, import_weights, load_into, open_source

with open_checkpoint("interrupted/checkpoints/step-00000040") as opened:
    export(opened, "exported", config={"architectures": ["MyModel"]}, dtype=torch.bfloat16)

model = torch.nn.Linear(8, 1)
load_into(model.state_dict(), open_source("exported"))  # also fills DTensors, each rank its own shards
assert torch.equal(model.weight, weight.bfloat16().float())

import_weights(open_source("exported"), "imported/checkpoints", step=0)  # a checkpoint to start a run from

exporter = HuggingFaceExport("hf", every=1000, config={"architectures": ["MyModel"]})
ckpt = Checkpointer("exporting/checkpoints", asynchronous=True, exporters=[exporter])  # runs after each save
ckpt.save(1000, {"model": model})
ckpt.close()
assert os.path.exists("hf/step-00001000/model.safetensors")

# Hugging Face and other formats

# my_maps.py, for `titan-ckpt convert ... --to hf --map my_maps:to_hf`
from dataclasses import dataclass


@dataclass
class Rename:
    internal: list
    external: list

    def to_external(self, tensors):
        return {self.external[0]: tensors[self.internal[0]]}

    def to_internal(self, tensors):
        return {self.internal[0]: tensors[self.external[0]]}


@dataclass
class Map:
    rules: list
    config: dict


def to_hf(config):
    return Map([Rename(["weight"], ["proj.weight"]), Rename(["bias"], ["proj.bias"])], {"architectures": ["MyModel"]})


with open_checkpoint("interrupted/checkpoints/step-00000040") as opened:
    export(opened, "renamed", to_hf({}))
assert set(open_source("renamed").tensors) == {"proj.weight", "proj.bias"}

# The command line

subprocess.run(shlex.split('titan-ckpt ls interrupted/checkpoints'), check=True)
subprocess.run(shlex.split('titan-ckpt show interrupted/checkpoints/step-00000040'), check=True)
subprocess.run(shlex.split('titan-ckpt verify interrupted/checkpoints'), check=True)
subprocess.run(shlex.split('titan-ckpt diff interrupted/checkpoints/step-00000040 uninterrupted/checkpoints/step-00000040'), check=True)
subprocess.run(shlex.split('titan-ckpt convert interrupted/checkpoints/step-00000040 weights.pt --to torch'), check=True)
subprocess.run(shlex.split('titan-ckpt prune interrupted/checkpoints --keep-last 1 --dry-run'), check=True)
subprocess.run(shlex.split('titan-ckpt pin interrupted/checkpoints 40 best-so-far'), check=True)
subprocess.run(shlex.split('titan-ckpt unpin interrupted/checkpoints best-so-far'), check=True)
subprocess.run(shlex.split('titan-ckpt restore interrupted/checkpoints 40'), check=True)
