"""Checkpoints forged entry by entry, each with what the refusal must say."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpt_hostile import (
    DATA,
    TENSORS,
    VALUES,
    forge_file,
    forge_header,
    forge_manifest,
    forge_state,
    forge_state_text,
    seal,
)
from ckpt_sources import read_all
from parity import same_bits
from titan_ckpt import CheckpointError, open_checkpoint, verify

Forge = Callable[[Path], None]


def tensor(**entries: Any) -> Forge:
    """Change what state.json says of model/w."""
    return forge_state(lambda state: state["tensors"]["model/w"].update(entries))


def chunk(**entries: Any) -> Forge:
    """Change what state.json says of the one chunk of model/w."""
    return forge_state(lambda state: state["tensors"]["model/w"]["chunks"][0].update(entries))


def entry(**entries: Any) -> Forge:
    """Change what the file's header says of model/w."""
    return forge_header(lambda header: header["model/w"].update(entries))


def listed(name: Any, size: Any = 1, hash_: Any = "0" * 32) -> Forge:
    return forge_manifest(lambda manifest: manifest["files"].update({name: {"size": size, "checksum": hash_}}))


def two_claims(state: dict[str, Any]) -> None:
    state["tensors"]["thief"] = state["tensors"]["model/w"]


def twice_in_one(state: dict[str, Any]) -> None:
    state["tensors"]["model/w"]["chunks"] *= 2


def two_halves(first: list[int], second: list[int]) -> Forge:
    """Two chunks of two rows each at the given offsets, both of the same entry's name."""

    def change(state: dict[str, Any]) -> None:
        described = state["tensors"]["model/w"]
        (whole,) = described["chunks"]
        described["chunks"] = [
            {**whole, "offsets": first, "lengths": [2, 4]},
            {**whole, "key": "other", "offsets": second, "lengths": [2, 4]},
        ]

    return forge_state(change)


def link(target: str) -> Forge:
    def forge(path: Path) -> None:
        (path / DATA).rename(path.parent / "elsewhere")
        (path / DATA).symlink_to(target)

    return forge


def through_a_linked_folder(path: Path) -> None:
    (path.parent / "outside").mkdir()
    (path.parent / "outside/x.json").write_text("{}")
    (path / "sub").symlink_to(path.parent / "outside")
    forge_manifest(lambda manifest: manifest["files"].update({"sub/x.json": {"size": 2, "checksum": "0" * 32}}))(path)
    seal(path)


def a_pipe(path: Path) -> None:
    """Opening it blocks forever."""
    (path / DATA).unlink()
    os.mkfifo(path / DATA)
    forge_manifest(lambda manifest: manifest["files"][DATA].update(size=0))(path)


def put(name: str, content: bytes) -> Forge:
    def forge(path: Path) -> None:
        (path / name).write_bytes(content)
        seal(path)

    return forge


def deep(count: int, opening: str = "[", closing: str = "]") -> str:
    return opening * count + closing * count


def overlapping(header: dict[str, Any]) -> None:
    header["model/w"]["data_offsets"] = header["scalar"]["data_offsets"]
    header["model/w"] |= {"shape": [2]}


FORGED: dict[str, tuple[Forge, str]] = {
    # the manifest
    "file above": (listed("../x"), "'../x', which is not inside"),
    "file above, further in": (listed("a/../../x"), "which is not inside"),
    "absolute file": (listed("/etc/passwd"), "which is not inside"),
    "file with a null": (listed("a\0b"), "which is not inside"),
    "file with a backslash": (listed("..\\x"), "which is not inside"),
    "the manifest in the manifest": (listed("manifest.json"), "which is not inside"),
    "negative size": (listed("x", -1), "invalid size or checksum for"),
    "size of 2^70": (listed("x", 1 << 70), "invalid size or checksum for"),
    "size that is true": (listed("x", True), "invalid size or checksum for"),
    "size that is infinite": (listed("x", float("inf")), "invalid size or checksum for"),
    "checksum that is not text": (listed("x", 1, 5), "cannot be read"),
    "file described by a list": (forge_manifest(lambda m: m["files"].update(x=[])), "cannot be read"),
    "files that are a list": (forge_manifest(lambda m: m.update(files=[])), "cannot be read"),
    "step that is infinite": (forge_manifest(lambda m: m.update(step=float("inf"))), "invalid step inf"),
    "step that is not a number": (forge_manifest(lambda m: m.update(step="1")), "invalid step '1'"),
    "step below zero": (forge_manifest(lambda m: m.update(step=-1)), "invalid step -1"),
    "no state": (forge_manifest(lambda m: m["files"].pop("state.json")), "does not list state.json"),
    "tensor file not listed": (forge_manifest(lambda m: m["files"].pop(DATA)), "which the manifest does not list"),
    "metrics that are text": (forge_manifest(lambda m: m.update(metrics={"loss": "low"})), "a metric is not a number"),
    "metadata nested 100,000 deep": (
        lambda path: (path / "manifest.json").write_text(deep(100_000)) and None,
        "cannot be read",
    ),
    "link to a file outside": (link("../elsewhere"), "outside of"),
    "link to a device": (link("/dev/zero"), "outside of"),
    "link through a folder": (through_a_linked_folder, "outside of"),
    "a pipe": (a_pipe, "not a regular file"),
    # state.json
    "nested 100,000 deep": (forge_state_text(lambda _: deep(100_000)), "state.json cannot be parsed"),
    "objects nested 100,000 deep": (
        forge_state_text(lambda _: deep(100_000, '{"a":', "}")),
        "state.json cannot be parsed",
    ),
    "values nested 900 deep": (
        forge_state_text(lambda text: text.replace('"values":{', '"values":{"d":' + deep(900) + ",", 1)),
        "nested deeper",
    ),
    "a tuple of nothing": (
        forge_state(lambda s: s["values"]["data"].update(betas={"$tuple": None})),
        "does not hold a tuple",
    ),
    "a tuple with more": (forge_state(lambda s: s["values"]["data"]["betas"].update(x=1)), "does not hold a tuple"),
    "metadata with a tuple of a number": (
        forge_manifest(lambda manifest: manifest.update(metadata={"x": {"$tuple": 3}})),
        "does not hold a tuple",
    ),
    "a key twice": (forge_state_text(lambda text: text.replace('"values"', '"tensors":{},"values"', 1)), "twice"),
    "a tensor twice": (forge_state_text(lambda text: text.replace('"scalar":{', '"model/w":{', 1)), "twice"),
    "a number of 10,000 digits": (
        forge_state_text(lambda text: text.replace('"shape":[3,4]', f'"shape":[{"9" * 10_000}]', 1)),
        "state.json cannot be parsed",
    ),
    "a list": (forge_state_text(lambda _: "[]"), "state.json cannot be parsed"),
    "a name with half a character": (
        forge_state_text(lambda text: text.replace('"scalar":{', '"scalar\\ud800":{', 1)),
        "cannot be written as UTF-8",
    ),
    "a value's key with half a character": (
        forge_state(lambda state: state["values"]["data"].update({"\ud800": 1})),
        "cannot be written as UTF-8",
    ),
    "a file's name with half a character": (listed("\ud800"), "cannot be written as UTF-8"),
    "no UTF-8": (put("state.json", b'{"\xff'), "cannot be parsed"),
    "tensors that are a list": (forge_state(lambda s: s.update(tensors=[])), "state.json cannot be parsed"),
    "piece of zero bytes": (forge_state(lambda s: s.update(piece_bytes=0)), "piece_bytes"),
    "piece of 2^62 bytes": (forge_state(lambda s: s.update(piece_bytes=1 << 62)), "piece_bytes"),
    "unknown dtype": (tensor(dtype="object"), "invalid entry for tensor 'model/w'"),
    "dtype that is an attribute of torch": (tensor(dtype="load"), "invalid entry for tensor"),
    "dtype that is a list": (tensor(dtype=["float32"]), "invalid entry for tensor"),
    "another dtype": (tensor(dtype="int32"), "but state.json says"),
    "negative shape": (tensor(shape=[-3, -4]), "invalid entry for tensor"),
    "infinite shape": (tensor(shape=[float("inf"), 4]), "invalid entry for tensor"),
    "fractional shape": (tensor(shape=[3.0, 4]), "invalid entry for tensor"),
    "shape that is true": (tensor(shape=[True, 4]), "invalid entry for tensor"),
    "shape whose product wraps to 12": (tensor(shape=[(1 << 64) + 12]), "impossible shape"),
    "shape of 2^80 elements": (tensor(shape=[1 << 40, 1 << 40]), "impossible shape"),
    "shape of nothing, and huge": (tensor(shape=[0, 1 << 62, 1 << 62], chunks=[]), "impossible shape"),
    "100 dimensions": (tensor(shape=[1] * 100), "impossible shape"),
    "no chunks": (tensor(chunks=[]), "is not covered"),
    "chunks that are text": (tensor(chunks="x"), "invalid entry for tensor"),
    "chunk outside": (chunk(offsets=[1, 0]), "outside of its shape"),
    "chunk too small": (chunk(lengths=[2, 4]), "is not covered"),
    "chunk of other dimensions": (chunk(offsets=[0], lengths=[12]), "a chunk of 1 dimensions"),
    "chunk that wraps": (chunk(offsets=[1 << 63, 0]), "outside of its shape"),
    "chunks that overlap": (two_halves([0, 0], [1, 0]), "covered twice"),
    "chunks with a gap": (
        forge_state(lambda s: s["tensors"]["model/w"].update(shape=[5, 4])),
        "is not covered by its chunks: they hold 12 of 20",
    ),
    "an entry claimed by two tensors": (forge_state(two_claims), "state.json: both '"),
    "an entry claimed twice": (forge_state(twice_in_one), "covered twice|uses one entry"),
    "chunk in a file above": (chunk(file="../x"), "which the manifest does not list"),
    "chunk in the manifest": (chunk(file="manifest.json"), "which the manifest does not list"),
    "chunk in state.json": (chunk(file="state.json"), "not a valid safetensors file"),
    "chunk in a list": (chunk(file=[DATA]), "state.json"),
    "chunk of a key that is a list": (chunk(key=["model/w"]), "state.json"),
    "chunk that is not in its file": (chunk(key="model/none"), "holds nothing under"),
    "no checksums": (chunk(checksums=[]), "0 checksums"),
    "too many checksums": (chunk(checksums=["0" * 32] * 2), "2 checksums"),
    "an invalid checksum": (chunk(checksums=["../../x"]), "invalid entry for tensor"),
    # the tensor file
    "header of 2^60 bytes": (forge_file(b"{}", b"x" * 48, 1 << 60), "claims a length of 1152921504606846976 bytes"),
    "header of 2^64-1 bytes": (forge_file(b"{}", b"", (1 << 64) - 1), "claims a length of"),
    "file of four bytes": (put(DATA, b"abcd"), "is truncated"),
    "header that is a list": (forge_file(b"[]"), "is not a JSON object"),
    "header nested deep": (forge_file(deep(100_000).encode()), "not a valid safetensors file"),
    "header with a key twice": (forge_file(b'{"a":{},"a":{}}'), "the key 'a' twice"),
    "header of a name with half a character": (
        forge_header(lambda header: header.update({"\ud800": header.pop("scalar")})),
        "not a valid safetensors file",
    ),
    "header with no UTF-8": (forge_file(b'{"\xff":1}'), "not a valid safetensors file"),
    "entries that overlap": (forge_header(overlapping), "must not overlap"),
    "entries with a gap": (entry(data_offsets=[0, 1]), "not a valid safetensors file"),
    "entry beyond the file": (entry(data_offsets=[0, 1 << 40], shape=[1 << 38]), "not a valid safetensors file"),
    "entry before the file": (entry(data_offsets=[-48, 0]), "not a non-negative integer"),
    "entry whose shape makes another length": (entry(shape=[3, 5]), "of shape [3, 5] in 48 bytes"),
    "entry whose product wraps": (entry(shape=[(1 << 62) + 3, 4]), "impossible shape"),
    "entry of negative shape": (entry(shape=[-3, -4]), "not a non-negative integer"),
    "entry of an unknown dtype": (entry(dtype="OBJECT"), "unknown dtype"),
    "entry without a shape": (forge_header(lambda header: header["model/w"].pop("shape")), "lacks 'shape'"),
    "entry that is text": (
        forge_header(lambda header: header.update({"model/w": "x"})),
        "not a valid safetensors file",
    ),
    "entry of another shape than the index says": (entry(shape=[4, 3]), "but state.json says"),
    "entry of 10,000 dimensions": (entry(shape=[1] * 10_000), "not a valid safetensors file"),
}


def use(path: Path) -> None:
    """Read everything there is."""
    with open_checkpoint(str(path)) as checkpoint:
        tensors = read_all(checkpoint)
        assert same_bits(tensors, TENSORS)
        assert checkpoint.values == VALUES


def refusal(path: Path) -> str:
    """Return how a checkpoint is refused: when it is opened or read, or else when all of it is checked."""
    try:
        use(path)
    except CheckpointError as error:
        return str(error)
    problems = verify(str(path), "checksum")
    assert problems, "not refused"
    return "; ".join(problems)
