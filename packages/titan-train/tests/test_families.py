"""What families of models have beyond a Llama: one loss in every layout, or a layout that is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import titan_model
from parity import assert_same_training
from ranks import Ranks
from titan_train.check import check, model_config
from titan_train.config import Config
from titan_train.errors import ConfigError
from train_cases import run_here, tiny

ALL = {
    "training__steps": "4",
    "schedule__decay": "none",
    "training__microbatch_size": "1",
    "data__mask_documents": "true",
    "data__packing": "best_fit",
    "model__n_kv_heads": "2",
}
YARN = {"rope__type": "yarn", "rope__factor": "4.0", "rope__original_context": "16"}
LONGROPE = {
    "rope__type": "longrope",
    "rope__factor": "4.0",
    "rope__original_context": "8",
    "rope__short_factor": "[1.0, 1.0, 1.5, 1.5, 2.0, 2.0]",
    "rope__long_factor": "[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]",
}
GRANITE = {
    "model__embedding_multiplier": "3.0",
    "model__residual_multiplier": "0.4",
    "model__attention_multiplier": "0.2",
    "model__logits_scaling": "0.5",
}
EXPERTS = {"model__preset": "debug_moe", "model__qk_norm": "false", "moe__n_experts": "4", "moe__ffn_dim": "32"}
FAMILIES = {
    "qwen2": {"model__qkv_bias": "true"},
    "smollm3": {"model__nope_layers": "[1]", "model__tied_embeddings": "true"},
    "granite": GRANITE,
    "yarn": YARN,
    # Everything that context parallelism supports, in one model.
    "mixed": {
        "model__qkv_bias": "true",
        "model__nope_layers": "[1]",
        "model__rotary_fraction": "0.5",
        **YARN,
        **GRANITE,
    },
    "mistral": {"model__window": "7", "model__full_layers": "[1]", "model__qkv_bias": "true"},
    "phi3": {"model__rotary_fraction": "0.75", **LONGROPE},
    "dynamic": {
        "rope__type": "dynamic",
        "rope__factor": "4.0",
        "rope__original_context": "8",
        "model__max_seq_len": "32",
    },
    "mixtral": {"model__window": "7", "moe__balance_loss": "0.3", **EXPERTS},
}
LAYOUTS = {
    "fsdp-tp": (4, {"parallel__tp": "2"}),
    "pp": (2, {"parallel__pp": "2"}),
    "cp": (2, {"parallel__cp": "2"}),
    "ep": (2, {"parallel__ep": "2"}),
}
SLOW = [("mixed", "fsdp-tp"), ("mixed", "cp"), ("mistral", "fsdp-tp"), ("mistral", "pp"), ("mixtral", "ep")]
BY_LENGTH = ("mistral", "phi3", "dynamic", "mixtral")


def config(folder: Path, family: str, **changes: str) -> Config:
    return tiny(**(ALL | FAMILIES[family] | {"run__folder": str(folder)} | changes))


class Alone(dict[str, dict]):
    """Results of one process, computed when they are first needed."""

    def __init__(self, ranks1: Ranks, folder: Path) -> None:
        self._one, self._folder = ranks1, folder

    def __missing__(self, family: str) -> dict:
        self[family] = self._one.run(run_here, config(self._folder / family, family))[0]
        assert self[family]["losses"][1] - self[family]["losses"][4] > 0.02  # a curve to follow
        return self[family]


@pytest.fixture(scope="module")
def single(ranks1: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return Alone(ranks1, tmp_path_factory.mktemp("single"))


def cases() -> list[object]:
    """Return each family with each layout that it supports: a few in the slow set, the others at night."""
    found = []
    for family in FAMILIES:
        for layout in LAYOUTS:
            if (layout == "cp" and family in BY_LENGTH) or (layout == "ep" and family != "mixtral"):
                continue
            mark = pytest.mark.slow if (family, layout) in SLOW else pytest.mark.nightly
            found.append(pytest.param(family, layout, marks=mark, id=f"{family}-{layout}"))
    return found


@pytest.mark.parametrize(("family", "layout"), cases())
def test_one_loss(
    request: pytest.FixtureRequest, single: dict[str, dict], tmp_path: Path, family: str, layout: str
) -> None:
    n_ranks, changes = LAYOUTS[layout]
    ranks: Ranks = request.getfixturevalue(f"ranks{n_ranks}")
    results = ranks.run(run_here, config(tmp_path, family, **changes))
    expected = {key: single[family][key] for key in ("losses", "norms", "weights")}
    assert_same_training(results, expected, stages=layout == "pp", norm_tolerance=1e-4, weight_tolerance=(1e-3, 1e-4))


@pytest.mark.parametrize("family", BY_LENGTH)
def test_what_no_rank_can_have_a_part_of_is_refused_by_name(tmp_path: Path, family: str) -> None:
    name = r"sliding window \(model.window 7\)" if family.startswith("mi") else "scaled by the length of each document"
    with pytest.raises(ConfigError, match=rf"parallel\.cp 2: .*{name}.*set parallel\.cp = 1"):
        check(config(tmp_path, family, parallel__cp="2"), world_size=2)


def test_a_config_can_spell_what_every_family_has(tmp_path: Path) -> None:
    spelled = {"yarn": "llama", "dynamic": "llama", "mistral": "qwen2"} | {
        family: family for family in ("qwen2", "smollm3", "granite", "phi3")
    }
    for family, kind in spelled.items():
        shape = model_config(config(tmp_path, family))
        assert titan_model.config_to_huggingface(shape)["model_type"] == kind
    mistral = model_config(config(tmp_path, "mistral", model__family="mistral", model__qkv_bias="false"))
    assert (mistral.window, mistral.full_layers, mistral.family) == (7, (1,), "mistral")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope__factor": "2.0"}, r'rope\.factor: it needs rope\.type = "linear"'),
        ({"rope__type": "default", "rope__factor": "2.0"}, r"rope\.factor: rope\.type default has no settings"),
        ({"rope__type": "yarn", "rope__factor": "2.0"}, "rope scaling: yarn needs factor, original_context"),
        ({"rope__type": "linear", "rope__beta_fast": "2.0"}, "beta_fast is not a setting of linear"),
        ({"rope__type": "linear", "rope__factor": "0.5"}, "factor must be at least 1"),
        ({"model__full_layers": "[0]"}, "no layer has a window: set window"),
        ({"model__window": "4", "model__full_layers": "[7]"}, r"full_layers contains \[7\], but the layers are 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(tiny(run__folder=str(tmp_path), **changes))
