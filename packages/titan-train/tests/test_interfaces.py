"""Contracts: each real producer against what its consumer declares. mypy holds the types; these hold the meaning."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import titan_ckpt
import titan_data
import titan_model
import titan_parallel
from titan_model.config import AttentionKind, NormKind
from titan_model.rope_scalings import ROPE_SCALINGS
from titan_train.assembly import Progress
from titan_train.config.model import ModelSection, MoESection, RopeSection
from titan_train.config.training import OptimizerSection
from titan_train.interfaces import Batch, BatchLoader
from titan_train.optimizer import Optimizer


class Counting(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of one rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """Rank 0 of a fake group of 8: enough to lay out a model, which communicates nothing while it is on meta."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", titan_model.preset_names())
def test_model_to_parallel(name: str, eight_ranks: None) -> None:
    """Every preset's own plan lays it out, shards every parameter, and keeps the names that init and files use."""
    config = replace(titan_model.preset(name), n_layers=2, nope_layers=())  # of its own widths; all blocks are alike
    plan = titan_model.parallel_plan(config)
    known = set(get_type_hints(titan_parallel.ParallelPlan))
    in_parts = {"attention"} if config.windows == {None} and not _depends_on_length(config) else set()
    assert set(plan) == known - {"attention"} | in_parts
    tp = math.gcd(4, *plan["divisible"].values(), config.n_kv_heads)
    titan_parallel.check_plan(plan, titan_parallel.Degrees(tp=tp), sequence_length=128)
    names = [name for name, _ in titan_model.build(config, "meta").named_parameters()]

    mesh = titan_parallel.build_mesh(titan_parallel.Degrees(tp=tp), "cpu")
    options = titan_parallel.ParallelOptions(activation_checkpointing="full")
    model = titan_parallel.parallelize(titan_model.build(config, "meta"), mesh, plan, options)
    laid_out = dict(model.named_parameters())
    assert list(laid_out) == names == [key for key in model.state_dict() if not key.endswith("router.bias")]
    for key, parameter in laid_out.items():  # tp does not split routers and norms
        unsplit = parameter.ndim == 1 or key.endswith("router.weight")
        rest = -parameter.shape[0] % 8 * parameter[0].numel() if tp == 1 else 0  # FSDP alone shards any number of rows
        assert parameter.to_local().numel() * 8 == parameter.numel() + rest or unsplit
    assert sum(p.to_local().numel() for p in laid_out.values()) < titan_model.count_parameters(config) / 7


def _depends_on_length(config: titan_model.DecoderConfig) -> bool:
    return config.rope_scaling is not None and config.rope_scaling.depends_on_length


def test_selective_checkpointing_knows_what_the_model_runs(one_rank: None) -> None:
    """Attention over documents and experts' products are computed once, by names that the model's operators have."""
    base = titan_model.preset("debug_moe")
    config = replace(base, n_layers=1, dim=64, vocab_size=16, attention="varlen")
    tokens, documents = torch.arange(16)[None], torch.tensor([[0] * 7 + [1] * 9])
    counts = {}
    for mode in ("none", "selective", "full"):
        mesh = titan_parallel.build_mesh(titan_parallel.Degrees(), "cpu")
        options = titan_parallel.ParallelOptions(activation_checkpointing=mode)
        plan = titan_model.parallel_plan(config)
        model = titan_parallel.parallelize(titan_model.build(config, "cpu"), mesh, plan, options)
        titan_model.set_num_target_tokens(model.parts[0], 1)
        with Counting() as counting:
            model.parts[0](tokens, document_ids=documents, labels=tokens).total.backward()
        counts[mode] = [counting.counts[name] for name in ("titan_model::document_attention", "aten::_grouped_mm")]
    assert counts["none"] == counts["selective"] == [1, 9]  # three products forward, twice as many backward
    assert counts["full"] == [2, 12]


def test_settings_name_the_kinds_of_the_model() -> None:
    """titan-train lists choices itself, to report typos before it imports torch; they are those of titan-model."""
    for key, kinds in (("norm", NormKind), ("attention", AttentionKind)):
        choices, _ = get_args(get_type_hints(ModelSection)[key])
        assert get_args(choices) == get_args(kinds)
    assert MoESection.model_fields.keys() <= titan_model.MoEConfig.__dataclass_fields__.keys()
    assert ModelSection.model_fields.keys() - {"preset"} <= titan_model.DecoderConfig.__dataclass_fields__.keys()
    types, _ = get_args(get_type_hints(RopeSection)["type"])
    assert set(get_args(types)) == {"default", *ROPE_SCALINGS}
    settings = {name for kind in ROPE_SCALINGS.values() for name in kind.__dataclass_fields__}
    assert RopeSection.model_fields.keys() - {"type"} == settings - {"depends_on_length"}


def test_data_to_loop() -> None:
    """The loader gives what the loop declares: names, shapes, dtypes, shift, and JSON for a state."""
    loader: BatchLoader = titan_data.Loader(
        titan_data.StdlibSource(),
        titan_data.ByteTokenizer(),
        seq_len=16,
        global_batch_size=4,
        distribution=titan_data.Distribution(rank=1, world_size=2),
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


def test_tokenizer_ids_fit_the_debug_model() -> None:
    tokenizer, config = titan_data.ByteTokenizer(), titan_model.preset("debug")
    assert max(tokenizer.bos_id, tokenizer.eos_id) < tokenizer.vocab_size <= config.vocab_size
