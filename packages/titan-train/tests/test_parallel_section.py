"""[parallel] is titan-parallel's options: each of them, and nothing written twice."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest

from titan_parallel import Degrees, Float8Options, ParallelOptions, PipelineOptions
from titan_train import load
from titan_train.config.fields import settings_of
from titan_train.config.parallel import ParallelSection, _options_of, with_keys
from titan_train.errors import ConfigError


def section(**values: Any) -> ParallelSection:
    return ParallelSection.model_validate(values)


def test_defaults_are_those_of_titan_parallel() -> None:
    assert section().degrees() == Degrees()
    assert section().options("float32") == ParallelOptions()
    assert section().options("bfloat16") == ParallelOptions(param_dtype="bfloat16")


def test_every_option_is_a_setting_with_its_text() -> None:
    settings = settings_of(ParallelSection)
    texts = [setting.help for setting in settings.values()]
    parts: tuple[Any, ...] = (Degrees, ParallelOptions, PipelineOptions, Float8Options)
    for option in (option for part in parts for option in fields(part)):
        if option.name not in ("param_dtype", "pipeline", "float8"):  # training.dtype; the parts
            assert any(with_keys(option.metadata["help"]) in text for text in texts), option.name
    assert len(settings) == sum(len(fields(part)) for part in parts) - 3


def test_values_arrive() -> None:
    given = {"tp": 2, "dp_shard": 4, "save_ops": ["aten.mm"], "activation_checkpointing": "selective", "compile": True}
    parts = {"pipeline_split": ["layers.1"], "stages_per_rank": 1, "float8": "rowwise", "float8_skip": ["layers.0"]}
    found = section(**given, **parts)
    assert found.degrees() == Degrees(tp=2, dp_shard=4)
    assert found.options() == ParallelOptions(
        save_ops=("aten.mm",),
        activation_checkpointing="selective",
        compile_blocks=True,
        pipeline=PipelineOptions(split=("layers.1",), stages_per_rank=1),
        float8=Float8Options(recipe="rowwise", skip=("layers.0",)),
    )


def test_float8_is_off_unless_a_recipe_is_given() -> None:
    assert section(float8_emulate=True).options().float8 is None
    assert load("debug", [("parallel.float8", "none")]).config.parallel.options().float8 is None


def test_a_new_option_needs_no_line_here() -> None:
    @dataclass(frozen=True, kw_only=True)
    class More(ParallelOptions):
        fresh: tuple[str, ...] = field(default=(), metadata={"help": "Something new."})

    (fresh,) = [option for option in _options_of(More) if option.key == "fresh"]
    assert (fresh.name, fresh.annotation, fresh.default, fresh.help) == ("fresh", list[str], [], "Something new.")


@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("tp", "0", "[parallel] degrees must be at least 1 (dp_shard may be -1): tp is 0"),
        ("float8_all_gather", "1", "parallel.float8_all_gather is 1: expected true or false"),
        ("context", "rings", "parallel.context is 'rings': expected one of allgather, ring, ulysses"),
    ],
)
def test_invalid_values_name_the_key(key: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load("debug", [(f"parallel.{key}", text)])
    assert says in str(raised.value)


def test_messages_name_options_as_the_user_writes_them() -> None:
    with pytest.raises(ConfigError, match="set compile too"):
        load("debug", [("parallel.activation_checkpointing", "budget"), ("parallel.memory_budget", "0.5")])
    assert with_keys("pipeline.split, float8.recipe: x; compile_blocks") == "pipeline_split, float8: x; compile"
