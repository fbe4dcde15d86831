"""Checkpoints forged with knowledge of the formats: their checksums are valid, their content is hostile."""

import copy
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp_metadata

from ckpt_sources import Tensors
from titan_ckpt.convert.titan_writer import write_titan
from titan_ckpt.format.checksum import PIECE_BYTES, checksum, pieces
from titan_ckpt.format.manifest import digest_of

DATA = "tensors-00000-of-00001.safetensors"
TENSORS = {
    "model/w": torch.arange(12.0).reshape(3, 4),
    "model/half": torch.ones(5).to(torch.bfloat16),
    "scalar": torch.tensor(7),
    "empty": torch.empty(0, 3),
}
VALUES = {"data": {"position": 3, "betas": (0.9, 0.95), "names": ["a", None, True]}}


def make_checkpoint(folder: Path) -> Path:
    """Write a small, valid checkpoint."""
    write_titan(Tensors(TENSORS, VALUES), folder, 1, metadata={"note": "valid"})
    return folder / "step-00000001"


def seal(path: Path) -> None:
    """Make the manifest agree with the files as they are now."""
    content = json.loads((path / "manifest.json").read_text())
    del content["digest"]
    for name in content["files"]:
        data = (path / name).read_bytes()
        content["files"][name] = {"size": len(data), "checksum": checksum(data)}
    (path / "manifest.json").write_text(json.dumps({**content, "digest": digest_of(content)}))


def forge_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return what changes a manifest, under a digest that fits."""

    def forge(path: Path) -> None:
        content = json.loads((path / "manifest.json").read_text())
        del content["digest"]
        change(content)
        (path / "manifest.json").write_text(json.dumps({**content, "digest": digest_of(content)}))

    return forge


def forge_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return what changes state.json, under checksums that fit."""

    def forge(path: Path) -> None:
        content = json.loads((path / "state.json").read_text())
        change(content)
        (path / "state.json").write_text(json.dumps(content))
        seal(path)

    return forge


def forge_state_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Return what changes the text of state.json, under checksums that fit."""

    def forge(path: Path) -> None:
        (path / "state.json").write_text(change((path / "state.json").read_text()))
        seal(path)

    return forge


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of the tensor file."""
    data = (path / DATA).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def forge_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Return what changes the header of the tensor file, under checksums that fit."""

    def forge(path: Path) -> None:
        header, data = split_file(path)
        header = copy.deepcopy(header)
        change(header)
        forge_file(json.dumps(header).encode(), data)(path)

    return forge


def forge_file(header: bytes, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    """Return what puts another tensor file in its place, under checksums that fit."""

    def forge(path: Path) -> None:
        (path / DATA).write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
        seal(path)

    return forge


def piece_checksums(data: bytes) -> list[str]:
    """Return what state.json says of a chunk's bytes."""
    return [checksum(data[start:stop]) for start, stop in pieces(len(data), PIECE_BYTES)]


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    """Programs that make `marker` when run, and others that ask for memory or disturb the reader."""
    touch = f"import pathlib; pathlib.Path({str(marker)!r}).touch()"
    nested = dcp_metadata.Metadata(state_dict_metadata={"a": Call(eval, f"__import__('os').mknod({str(marker)!r})")})

    def opcodes(*parts: bytes) -> bytes:
        return b"\x80\x04" + b"".join(parts) + b"."

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    def named(module: str, name: str) -> bytes:
        return text(module) + text(name) + b"\x93"

    record = named("torch.distributed.checkpoint.metadata", "Metadata")
    dtype = named("torch", "float32")
    return {
        "os.system": pickle.dumps(Call(os.system, f"touch {marker}")),
        "eval": pickle.dumps(Call(eval, f"__import__('os').mknod({str(marker)!r})")),
        "exec within a record": pickle.dumps(nested),
        "exec, protocol 0": pickle.dumps(Call(exec, touch), protocol=0),
        "exec as a planner's path": pickle.dumps(dcp_metadata.Metadata({}, planner_data=Call(exec, touch))),
        "getattr of a module": opcodes(named("builtins", "getattr"), named("os", "system"), b"\x86R"),
        "a dotted name": opcodes(named("torch.distributed.checkpoint.metadata", "os.system"), text("x"), b"\x85R"),
        "a dotted name of torch": opcodes(named("torch", "hub.load"), b")R"),
        "torch.load": opcodes(named("torch", "load"), text(str(marker)), b"\x85R"),
        "a sibling in an admitted module": opcodes(named("torch.serialization", "load"), text("x"), b"\x85R"),
        "torch.Size of another module": opcodes(named("torch._C", "Size"), b")\x85R"),
        "the unpickler's own module": opcodes(named("titan_ckpt.convert.dcp.metadata", "pickle"), b"."),
        "the extension registry": opcodes(b"\x82\x01"),
        "a persistent id": opcodes(text("x"), b"Q"),
        "INST": b"(S'touch %b'\nios\nsystem\n." % str(marker).encode(),
        "a class as the state's target": opcodes(record, b"}", text("kind"), text("x"), b"s", b"b"),
        "slots of a class": opcodes(record, b"N}", text("__init__"), dtype, b"s\x86b"),
        "attributes of a dtype": opcodes(dtype, b"}", text("x"), text("y"), b"sb"),
        "a call of a dtype": opcodes(dtype, b")R"),
        "an object under a large number": opcodes(b"N", b"r\xff\xff\xff\x01"),
        "bytes of 2^60": opcodes(b"\x8e" + struct.pack("<Q", 1 << 60)),
        "a bytearray of 2^40": opcodes(b"\x96" + struct.pack("<Q", 1 << 40)),
        "text of 2^50": opcodes(b"\x8d" + struct.pack("<Q", 1 << 50)),
        "a frame of 2^61": opcodes(b"\x95" + struct.pack("<Q", 1 << 61)),
        "a number of 10^6 digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "tuples in tuples": opcodes(b")" + b"\x85" * 200_000),
        "doubled 60 times": opcodes(b"]" + b"2\x86" * 60),
        "nothing": b"",
        "cut short": pickle.dumps(nested)[:-20],
        "not a pickle": b"\x00\x01\x02",
        "another object": pickle.dumps({"state_dict_metadata": {}}),
        "no tables": pickle.dumps(dcp_metadata.Metadata(None)),  # type: ignore[arg-type]
    }


def torch_archive(data: bytes) -> bytes:
    """Return a file of torch.save with a pickle of one's own."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"x/{name}", content)
    return out.getvalue()


_CALLABLE = (
    ("builtins", "bytearray"),
    ("builtins", "set"),
    ("_codecs", "encode"),
    ("torch", "Tensor"),
    ("torch.storage", "UntypedStorage"),
    ("torch._tensor", "_rebuild_from_type_v2"),
)


def _binary(text: bytes) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text


def _power(power: int) -> bytes:
    return b"\x8a\x09" + (1 << power).to_bytes(9, "little")


def _levels(innermost: bytes, pair: Callable[[bytes], bytes], depth: int) -> bytes:
    """Each level holds the one before twice: `q` stores it, `h` reads it."""
    parts = [innermost]
    for level in range(depth):
        stored = bytes([level])
        parts += [b"q" + stored + b"0", pair(b"h" + stored)]
    return b"".join(parts)


def greedy_pickles() -> dict[str, bytes]:
    """Pickles of at most some hundred kilobytes that take gigabytes or hours if they are read as they are."""
    named = {name: f"c{module}\n{name}\n".encode() for module, name in _CALLABLE}
    many = b"h\x00" * 30_000

    def called(name: str, *arguments: bytes) -> bytes:
        return named[name] + b"(" + b"".join(arguments) + b"tR"

    a, b = _binary(b"a"), _binary(b"b")
    tuples = _levels(b"K\x00", lambda one: one + one + b"\x86", 60)
    long_list = b"](" + b"K\x00" * 30_000 + b"eq\x000"
    values = {
        "a bytearray of 2^33": called("bytearray", _power(33)),
        "a bytearray of 2^33, by another function": called(
            "_rebuild_from_type_v2", named["bytearray"], named["Tensor"], b"(" + _power(33) + b"t", b"N"
        ),
        "a bytearray of 2^33 whose bytes are absent": b"\x96" + struct.pack("<Q", 1 << 33),
        "a storage of 2^40": called("UntypedStorage", _power(40)),
        "a tensor of 2^40": called("Tensor", _power(40)),
        "bytes that a codec makes longer each time": called(
            "encode", _levels(a, lambda one: called("encode", one, _binary(b"hex")), 45), _binary(b"hex")
        ),
        "lists of lists of the same": _levels(b"]", lambda one: b"](" + one + one + b"e", 60),
        "dicts of dicts of the same": _levels(b"}", lambda one: b"}(" + a + one + b + one + b"u", 30),
        "a key of tuples of the same": b"}" + tuples + b"Ns",
        "a set of tuples of the same": called("set", b"](" + tuples + b"e"),
        "a list that holds itself": b"]q\x00h\x00a",
        "one text many times": b"}" + _binary(b"t" * 100_000) + b"q\x00](" + many + b"es",
        "one list many times": long_list + b"](" + many + b"e",
        "sets of one list, many times": long_list + b"](" + called("set", b"h\x00") * 5_000 + b"e",
    }
    return {name: b"\x80\x02}" + _binary(b"w") + value + b"s." for name, value in values.items()}
