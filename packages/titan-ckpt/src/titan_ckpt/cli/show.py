"""`titan-ckpt show`: show the content of one checkpoint."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from titan_ckpt.cli._text import size, to_json
from titan_ckpt.convert.formats import FORMATS, config_of, format_at, open_source
from titan_ckpt.convert.source import AnySpec, TensorSource, size_of
from titan_ckpt.format.json_values import encode
from titan_ckpt.format.safetensors_header import dtype_name
from titan_ckpt.load.reader import CheckpointReader
from titan_ckpt.messages import printable


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of titan-ckpt or of another format")
    parser.add_argument("--from", dest="kind", choices=FORMATS, help="format of CHECKPOINT (default: detected)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show one checkpoint; no tensor data is read."""
    kind = arguments.kind or format_at(arguments.checkpoint)
    source = open_source(arguments.checkpoint, kind)
    about = _about(source)
    if arguments.json:
        tensors = {name: _describe(spec) for name, spec in source.tensors.items()}
        values = {name: encode(value, name) for name, value in source.values.items()}
        print(to_json({"format": kind, **about, "values": values, "tensors": tensors}))
        return 0
    total = sum(size_of(spec) for spec in source.tensors.values())
    print(f"{printable(arguments.checkpoint)}: {kind}, {len(source.tensors)} tensors, {size(total)}")
    for title, content in [
        *about.items(),
        ("values", dict(source.values)),
        ("left out", getattr(source, "left_out", {})),
    ]:
        if content not in (None, {}, ""):
            print(f"{title}: {_indented(content)}")
    print("tensors:")
    _print_tree(_tree_of(source.tensors), "  ")
    return 0


def _about(source: TensorSource) -> dict[str, Any]:
    if isinstance(source, CheckpointReader):
        manifest = asdict(source.manifest)
        manifest["files"] = {name: record["size"] for name, record in manifest["files"].items()}
        return {key: encode(value, key) for key, value in manifest.items()}
    return {"config": dict(config_of(source))}


def _describe(spec: AnySpec) -> dict[str, Any]:
    return {"dtype": dtype_name(spec.dtype), "shape": list(spec.shape), "bytes": size_of(spec)}


def _indented(content: Any) -> str:
    if isinstance(content, str):
        return printable(content)
    text = json.dumps(content, indent=2, default=str)
    return "\n  ".join(printable(line) for line in text.splitlines())


def _tree_of(tensors: Mapping[str, AnySpec]) -> dict[str, Any]:
    """Return the tensors as a tree along the "/" of their names; inner nodes end with "/"."""
    tree: dict[str, Any] = {}
    for name, spec in tensors.items():
        *branches, last = name.split("/", 16)  # limits the depth of the recursion below
        at = tree
        for branch in branches:
            at = at.setdefault(f"{branch}/", {})
        at[last] = spec
    return tree


def _print_tree(tree: Mapping[str, Any], indent: str) -> None:
    width = max((len(printable(name)) for name, branch in tree.items() if not isinstance(branch, dict)), default=0)
    for name, branch in tree.items():
        if isinstance(branch, dict):
            count, nbytes = _sum(branch)
            print(f"{indent}{printable(name)}  {count} tensors, {size(nbytes)}")
            _print_tree(branch, indent + "  ")
        else:
            kind = f"{dtype_name(branch.dtype)} {list(branch.shape)}"
            print(f"{indent}{printable(name).ljust(width)}  {kind}  {size(size_of(branch))}")


def _sum(tree: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of tensors in a tree and their total size in bytes."""
    parts = [_sum(branch) if isinstance(branch, dict) else (1, size_of(branch)) for branch in tree.values()]
    return sum(count for count, _ in parts), sum(nbytes for _, nbytes in parts)
