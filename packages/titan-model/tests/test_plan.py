"""The plan speaks of the decoder that is built, and of all of it."""

import re
from dataclasses import replace
from math import gcd

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model_families import presets
from titan_model import DecoderConfig, DynamicScaling, build, parallel_plan, preset
from titan_model.config import MoEConfig


def matches(glob: str, name: str) -> bool:
    """Tell whether a dotted name is meant; `*` stands for any run of characters within one part."""
    return re.fullmatch(re.escape(glob).replace(r"\*", "[^.]*"), name) is not None


def named(model: nn.Module, glob: str) -> list[str]:
    """Return the modules, and the parameters that are no module's only one, which a glob names."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    return [name for name in names if matches(glob, name)]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_glob_names_modules(small_configs: st.SearchStrategy[DecoderConfig], data: st.DataObject) -> None:
    config = data.draw(small_configs)
    plan, model = parallel_plan(config), build(config, "meta")
    with_experts = sum(config.has_experts(layer) for layer in range(config.n_layers))
    for glob in (*plan["blocks"], *plan["before"], *plan["after"], *plan["tensor"]):
        # One in the model, one in each block, or one in each block of a kind.
        expected = config.n_layers if "*" in glob else 1
        if re.search(r"\.ffn\.(router|experts|shared)", glob):
            expected = with_experts
        elif ".ffn." in glob:
            expected = config.n_layers - with_experts
        assert len(named(model, glob)) == expected > 0, glob


@pytest.mark.parametrize("name", presets())
def test_presets_have_their_plan(name: str) -> None:
    plan, model = parallel_plan(preset(name)), build(preset(name), "meta")
    assert all(named(model, glob) for glob in plan["tensor"])
    assert len(named(model, plan["blocks"][0])) == preset(name).n_layers


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_parameter_has_one_role_and_one_place(
    small_configs: st.SearchStrategy[DecoderConfig], data: st.DataObject
) -> None:
    config = data.draw(small_configs)
    plan, model = parallel_plan(config), build(config, "meta")
    for name, _ in model.named_parameters(remove_duplicate=False):
        owner = name.rpartition(".")[0]
        assert sum(matches(glob, owner) + matches(glob, name) for glob in plan["tensor"]) == 1, name
        # Above the parameter lies exactly one of: what comes first, a block, what comes last.
        parts = owner.split(".")
        above = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
        places = [*plan["before"], *plan["blocks"], *plan["after"]]
        assert sum(any(matches(glob, module) for module in above) for glob in places) == 1, name


def test_places_are_in_the_order_of_the_forward(tiny: DecoderConfig) -> None:
    plan, model = parallel_plan(tiny), build(tiny, "cpu")
    ran: list[str] = []
    wanted = [name for part in ("before", "blocks", "after") for glob in plan[part] for name in named(model, glob)]
    for name in wanted:
        model.get_submodule(name).register_forward_pre_hook(lambda _m, _a, name=name: ran.append(name))
    model(torch.zeros(1, 2, dtype=torch.long))
    assert ran == wanted


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tied_pair_is_there_when_tied(tiny: DecoderConfig, tied: bool) -> None:
    config = replace(tiny, tied_embeddings=tied)
    plan, model = parallel_plan(config), build(config, "meta")
    assert plan["tied"] == ([("head.weight", "embed.weight")] if tied else [])
    for alias, owner in plan["tied"]:
        assert model.get_parameter(alias) is model.get_parameter(owner)
        names = [name for name, _ in model.named_parameters()]
        assert owner in names
        assert alias not in names
    assert (model.head.weight is model.embed.weight) == tied


SPLIT_DIM = {"colwise": 0, "colwise_kv": 0, "logits": 0, "vocab": 0, "rowwise": 1}


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_degree_that_divides_the_sizes_divides_the_weights(
    small_configs: st.SearchStrategy[DecoderConfig], data: st.DataObject
) -> None:
    config = data.draw(small_configs)
    plan, model = parallel_plan(config), build(config, "meta")
    largest = gcd(*plan["divisible"].values(), plan["heads"][1])  # more ranks than that share key/value heads
    for degree in (d for d in range(1, largest + 1) if largest % d == 0):
        for glob, role in plan["tensor"].items():
            for name in named(model, glob) if role in SPLIT_DIM else []:
                if ".experts." in name:  # a parameter, experts first; each rank's share is of whole eights
                    split, rest = divmod(model.get_parameter(name).shape[1 + SPLIT_DIM[role]], degree)
                    rest += split % 8
                else:
                    split, rest = divmod(model.get_submodule(name).weight.shape[SPLIT_DIM[role]], degree)
                assert rest == 0, (name, degree)
                if ".attn." in name:  # whole heads, as each rank computes its own
                    assert split % config.attention_head_dim == 0, (name, degree)


def test_each_named_size_is_needed() -> None:
    # One size at a time is made odd, and with it the plan's own entry, so that a message can say which.
    even = DecoderConfig(vocab_size=8, dim=24, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=8, max_seq_len=8)
    changes = {"vocab_size": 9, "ffn_dim": 9}
    assert gcd(*parallel_plan(even)["divisible"].values()) == 4
    for name, value in changes.items():
        odd = [key for key, size in parallel_plan(replace(even, **{name: value}))["divisible"].items() if size % 2]
        assert len(odd) == 1
        assert f"({name})" in odd[0]
    heads = parallel_plan(replace(even, n_heads=3, n_kv_heads=3))["divisible"]
    assert [key for key, size in heads.items() if size % 2] == ["attention heads (n_heads)"]


@pytest.mark.parametrize("part", ["attn", "ffn", "ffn.shared", "ffn.experts"])
def test_column_and_row_follow_one_another(tiny: DecoderConfig, part: str) -> None:
    # Within attention and feed-forward the row-split projection comes after the column-split ones: what they put out
    # split is what it takes in.
    moe = MoEConfig(n_experts=2, top_k=1, ffn_dim=8, shared_ffn_dim=8, dense_layers=(0,))
    config = replace(tiny, moe=moe, qk_norm=True)
    plan, model = parallel_plan(config), build(config, "meta")
    inside = model.layers["1" if "ffn." in part else "0"].get_submodule(part)
    names = [name for name, _ in [*inside.named_children(), *inside.named_parameters(recurse=False)]]
    roles = [plan["tensor"][f"layers.*.{part}.{name}"] for name in names if name.endswith("_proj")]
    assert roles[-1] == "rowwise"
    assert set(roles[:-1]) <= {"colwise", "colwise_kv"}


def test_what_needs_full_sequences_names_no_attention_to_replace(tiny: DecoderConfig) -> None:
    dynamic = DynamicScaling(factor=2.0, original_context=32)
    for changes in ({"window": 16}, {"rope_scaling": dynamic}, {"window": 16, "full_layers": (0,)}):
        assert "attention" not in parallel_plan(replace(tiny, **changes))
    for changes in ({}, {"window": 64}, {"window": 16, "full_layers": (0, 1)}, {"nope_layers": (0,)}):
        assert parallel_plan(replace(tiny, **changes))["attention"] == ["layers.*.attn.core"]


def test_what_only_some_blocks_have_is_named_where_it_is() -> None:
    moe = MoEConfig(n_experts=2, top_k=1, ffn_dim=8, shared_ffn_dim=3)
    even = DecoderConfig(vocab_size=8, dim=24, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=9, max_seq_len=8, moe=moe)
    odd = [key for key, size in parallel_plan(even)["divisible"].items() if size % 2]
    # No block has a dense feed-forward; of an expert's width, 8, there is one eighth.
    assert odd == ["eighths of an expert's width (moe.ffn_dim / 8)", "shared expert's width (moe.shared_ffn_dim)"]
    mixed = replace(even, moe=replace(moe, dense_layers=(1,), ffn_dim=16, shared_ffn_dim=4))
    styles = parallel_plan(mixed)["tensor"]
    assert (styles["layers.*.ffn"], styles["layers.1.ffn"]) == ("mixture", "gather")  # a later pattern holds
    assert parallel_plan(mixed)["n_experts"] == 2
    assert [key for key, size in parallel_plan(mixed)["divisible"].items() if size % 2] == [
        "feed-forward width (ffn_dim)"
    ]
    dense = replace(even, moe=replace(moe, dense_layers=(0, 1)))
    assert not any("router" in name or "shared" in name for name in parallel_plan(dense)["tensor"])
    assert (parallel_plan(dense)["experts"], parallel_plan(dense)["n_experts"]) == ([], 0)
