"""The table names every parameter once, and its bytes are those that the rank has."""

from __future__ import annotations

import re

import pytest

import parallel_describe
from parallel_cases import build
from ranks import Ranks
from titan_parallel import Degrees, Float8Options, ParallelOptions
from titan_parallel.describe import _blocks

NAMES = sorted(name for name, _ in build(False).named_parameters())


def rows(text: str) -> list[list[str]]:
    table = text.split("\n\n")[1].splitlines()[2:]
    return [re.split(r"\s{2,}", line.strip()) for line in table]


def spelt_out(name: str) -> list[str]:
    """Return the parameters that a line is about."""
    found = re.fullmatch(r"(.*?\.)([\d,-]*-[\d,-]*|\d+,[\d,]+)(\..*)", name)
    if not found:
        return [name]
    bounds = [part.split("-") for part in found[2].split(",")]
    numbers = [n for first, *last in bounds for n in range(int(first), int(*last or [first]) + 1)]
    return [f"{found[1]}{n}{found[3]}" for n in numbers]


@pytest.mark.parametrize(
    ("degrees", "tied"),
    [(Degrees(), True), (Degrees(tp=2), True), (Degrees(dp_replicate=2), False), (Degrees(tp=4), False)],
    ids=["fsdp-tied", "fsdp-tp-tied", "hsdp-untied", "tp4-untied"],
)
def test_parameters_and_bytes(ranks4: Ranks, degrees: Degrees, tied: bool) -> None:
    for text, local, sharded in ranks4.run(parallel_describe.table, degrees, tied):
        lines = rows(text)
        found = sorted(name for line in lines for name in spelt_out(line[0]))
        assert found == [name for name in NAMES if not (tied and name == "vocab_out.weight")]
        assert sum(int(line[-1].replace(",", "")) for line in lines) == local
        assert f"parameters: {local:,} bytes" in text
        assert f"gradients: {local:,} bytes" in text
        assert f"{2 * local:,} bytes" in text
        assert {line[5] for line in lines} == {"float32"}
        for name, shape in sharded.items():
            line = next(line for line in lines if name in spelt_out(line[0]))
            assert (line[3], line[4]) == shape
        assert len(lines) < len(NAMES) / 2  # blocks are one


@pytest.mark.parametrize(
    ("degrees", "style", "placement"),
    [
        (Degrees(), "-", "fsdp dim 0"),
        (Degrees(tp=2), "colwise", "fsdp dim 0, tp dim 0"),
        (Degrees(dp_replicate=2), "-", "dp_replicate replicated, fsdp dim 0"),
        (Degrees(tp=4), "colwise", "tp dim 0"),
    ],
    ids=str,
)
def test_style_and_placement(ranks4: Ranks, degrees: Degrees, style: str, placement: str) -> None:
    text = ranks4.run(parallel_describe.table, degrees, False)[0][0]
    line = next(line for line in rows(text) if line[0] == "stack.0-2.mix.query.weight")
    assert line[1:3] == [style, placement]
    if degrees.tp > 1:
        norm = next(line for line in rows(text) if line[0] == "stack.0-2.norm1.weight")
        assert norm[1] == "sequence"
        assert norm[2].endswith("tp replicated")


def test_notes(ranks2: Ranks, ranks1: Ranks) -> None:
    text = ranks1.run(parallel_describe.table, Degrees(), False)[0][0]
    assert text.startswith("1 ranks: no parallelism\n\n")
    assert {line[2] for line in rows(text)} == {"unsharded"}
    options = ParallelOptions(
        param_dtype="bfloat16",
        activation_checkpointing="full",
        checkpoint_every=2,
        compile_blocks=True,
        cpu_offload=True,
        reshard_after_forward="never",
    )
    notes = ranks2.run(parallel_describe.table, Degrees(), False, options)[0][0].split("\n\n")[0].splitlines()
    assert notes == [
        "2 ranks: dp_shard 2",
        "forward and backward in bfloat16, gradients summed in float32",
        "between a block's forward and backward its weights stay gathered",
        "parameters, gradients and optimizer state in host memory",
        "activation checkpointing: full, one of every 2 of 3 blocks",
        "compiled: each of 3 blocks, by inductor",
    ]


@pytest.mark.slow
def test_float8_is_told(ranks2: Ranks) -> None:
    pytest.importorskip("torchao")
    options = ParallelOptions(float8=Float8Options(emulate=True, skip=("stack.1",)))
    text = ranks2.run(parallel_describe.table, Degrees(tp=2), False, options)[0][0]
    assert "float8: 12 linears, tensorwise, emulated" in text
    styles = {line[0]: line[1] for line in rows(text)}
    assert styles["stack.0,2.mix.query.weight"] == "colwise, float8"
    assert styles["stack.1.mix.query.weight"] == "colwise"


@pytest.mark.parametrize(
    ("names", "one"),
    [
        (["layers.0", "layers.1", "layers.2"], "layers.0-2"),
        (["layers.0", "layers.2", "layers.3", "layers.9"], "layers.0,2-3,9"),
        (["h.10", "h.9"], "h.9-10"),
        (["enc.0", "dec.0"], "enc.0,dec.0"),
        (["0", "1"], "0-1"),
        (["a", "b"], "a,b"),
    ],
)
def test_names_of_blocks(names: list[str], one: str) -> None:
    assert _blocks(names) == one
