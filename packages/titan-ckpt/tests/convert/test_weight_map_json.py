import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_sources import SMALL_JSON, Tensors, read_all, same, small_foreign, small_native
from titan_ckpt import CheckpointError
from titan_ckpt.convert.weight_map import Mapped
from titan_ckpt.convert.weight_map_json import read_json_map


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_every_kind_of_rule_in_both_directions(tmp_path: Path) -> None:
    weight_map = read_json_map(written(tmp_path / "map.json", SMALL_JSON))
    assert weight_map.config == {"model_type": "small"}
    assert same(read_all(Mapped(Tensors(small_native()), weight_map.rules, "to_foreign")), small_foreign())
    assert same(read_all(Mapped(Tensors(small_foreign()), weight_map.rules, "to_native")), small_native())


def test_rules_are_repeated(tmp_path: Path) -> None:
    content = {
        "rules": [
            {"native": "l.{i}.w", "foreign": "h.{i}.{i}.w", "repeat": {"i": 2}},
            {"native": "l.{i}.e", "foreign": ["h.{i}.a.{e}", "h.{i}.b.{e}"], "join": "cat", "dim": 1,
             "repeat": {"i": 2}, "over": {"e": 2}},
        ]
    }  # fmt: skip
    rules = read_json_map(written(tmp_path / "map.json", content)).rules
    assert [rule.foreign for rule in rules] == [
        ("h.0.0.w",),
        ("h.1.1.w",),
        ("h.0.a.0", "h.0.a.1", "h.0.b.0", "h.0.b.1"),
        ("h.1.a.0", "h.1.a.1", "h.1.b.0", "h.1.b.1"),
    ]
    tensor = torch.arange(16.0).reshape(2, 8)
    made = rules[2].to_foreign({"l.0.e": tensor})
    assert torch.equal(made["h.0.a.1"], tensor[:, 2:4])
    assert torch.equal(rules[2].to_native(made)["l.0.e"], tensor)


def test_parts_that_do_not_divide(tmp_path: Path) -> None:
    content = {"rules": [{"native": "x", "foreign": ["a", "b"], "join": "cat"}]}
    rules = read_json_map(written(tmp_path / "map.json", content)).rules
    with pytest.raises(CheckpointError, match='5 is not divisible by 2: give "sizes"'):
        Mapped(Tensors({"x": torch.ones(5)}), rules, "to_foreign")


WRONG: dict[str, tuple[Any, str]] = {
    "a list": ([], "holds a list where a JSON object"),
    "no rules": ({"config": {}}, 'a weight map has "rules"'),
    "unknown entry": ({"rules": [], "x": 1}, 'a weight map has "rules"'),
    "config that is none": ({"rules": [], "config": 3}, '"config" must be an object'),
    "rule that is none": ({"rules": [3]}, r"rules\[0\]: a rule is an object"),
    "no foreign": ({"rules": [{"native": "a"}]}, r"rules\[0\]: 'foreign' is missing"),
    "typo": ({"rules": [{"native": "a", "foreign": "b", "transposed": True}]}, "'transposed' is unknown; there are"),
    "names without a join": (
        {"rules": [{"native": "a", "foreign": ["b", "c"]}]},
        'several names on one side need "join"',
    ),
    "names on both sides": (
        {"rules": [{"native": ["a", "b"], "foreign": ["c", "d"], "join": "cat"}]},
        "one side must have one name",
    ),
    "join unknown": ({"rules": [{"native": "a", "foreign": ["b", "c"], "join": "sum"}]}, '"join" is one of cat'),
    "dim that is none": ({"rules": [{"native": "a", "foreign": "b", "dim": "0"}]}, "'0' is no int"),
    "bomb": ({"rules": [{"native": "a{i}{j}", "foreign": "b", "repeat": {"i": 10**5, "j": 10**5}}]}, "more rules than"),
    "negative": ({"rules": [{"native": "a{i}", "foreign": "b", "repeat": {"i": -1}}]}, "a range is a number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_with_their_place(tmp_path: Path, name: str) -> None:
    content, told = WRONG[name]
    with pytest.raises(CheckpointError, match=told):
        read_json_map(written(tmp_path / "map.json", content))
