"""Contracts: each real producer against what its consumer declares. mypy holds the types; these hold the meaning."""

from __future__ import annotations

import json
from typing import get_type_hints

import pytest
import torch

import titan_ckpt
import titan_data
import titan_model
import titan_parallel
from titan_parallel.plan import match_modules
from titan_train.assembly import Progress
from titan_train.config import OptimizerSection
from titan_train.optimizer import Optimizer
from titan_train.seams import Batch, BatchLoader


@pytest.mark.parametrize("name", titan_model.preset_names())
def test_model_to_parallel(name: str) -> None:
    """Every preset's plan names real modules, covers all parameters and allows the usual degrees."""
    config = titan_model.preset(name)
    model, plan = titan_model.build(config), titan_model.parallel_plan(config)
    assert plan.keys() == get_type_hints(titan_parallel.ParallelPlan).keys()
    titan_parallel.check_plan(plan, tp=4, sequence_length=128)
    named = {module for pattern in plan["tensor"] for module in match_modules(model, [pattern])}
    for parameter, _ in model.named_parameters():
        assert parameter.rsplit(".", 1)[0] in named
    blocks = match_modules(model, plan["blocks"])
    assert len(blocks) == config.n_layers
    ends = match_modules(model, [*plan["before"], *plan["after"]])
    holding = {parameter.split(".")[0] for parameter, _ in model.named_parameters()}
    assert holding <= {block.split(".")[0] for block in blocks} | set(ends)


def test_data_to_loop() -> None:
    """The loader gives what the loop declares: names, shapes, dtypes, shift, and JSON for a state."""
    loader: BatchLoader = titan_data.Loader(
        titan_data.StdlibSource(), titan_data.ByteTokenizer(), seq_len=16, global_batch_size=4, rank=1, world=2
    )
    batch: Batch = next(loader)
    assert batch.keys() == get_type_hints(Batch).keys()
    for key in ("tokens", "labels", "positions", "document_ids"):
        value = batch[key]  # type: ignore[literal-required]
        assert (value.shape, value.dtype, value.device.type) == ((2, 16), torch.int64, "cpu")
    assert batch["sources"] == ["stdlib", "stdlib"]
    same = batch["document_ids"][:, 1:] == batch["document_ids"][:, :-1]
    assert torch.equal(batch["labels"][:, :-1][same], batch["tokens"][:, 1:][same])
    assert json.loads(json.dumps(loader.state_dict())) == loader.state_dict()


def test_everything_saved_is_stateful() -> None:
    """What titan-train hands to titan-ckpt fits its protocol and survives a round trip."""
    model = torch.nn.Linear(3, 2)
    optimizer = Optimizer(model.named_parameters(), OptimizerSection())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step(1.0)
    stateful: list[titan_ckpt.Stateful] = [optimizer, Progress()]
    for one in stateful:
        one.load_state_dict(one.state_dict())
    fresh = Optimizer(torch.nn.Linear(3, 2).named_parameters(), OptimizerSection())
    fresh.load_state_dict(optimizer.state_dict())
    for name, state in optimizer.state_dict().items():
        for key, value in state.items():
            assert torch.equal(fresh.state_dict()[name][key], value)


def test_model_and_init_and_parallel_names_agree() -> None:
    """titan-parallel's clean names are the names that titan-model initialises and that checkpoints hold."""
    config = titan_model.preset("debug")
    plain = dict(titan_model.build(config).named_parameters())
    with torch.device("meta"):
        wrapped = titan_model.Decoder(config)
    for name, block in list(wrapped.layers.items()):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        wrapped.layers[name] = checkpoint_wrapper(block)
    from titan_parallel.plan import clean_name

    assert [clean_name(name) for name, _ in wrapped.named_parameters()] == list(plain)


def test_tokenizer_ids_fit_the_debug_model() -> None:
    tokenizer, config = titan_data.ByteTokenizer(), titan_model.preset("debug")
    assert max(tokenizer.bos_id, tokenizer.eos_id) < tokenizer.vocab_size <= config.vocab_size
