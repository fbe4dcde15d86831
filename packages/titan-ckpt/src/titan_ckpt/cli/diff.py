"""`titan-ckpt diff`: compare two checkpoints."""

import argparse
import json
from typing import Any

import torch

from titan_ckpt.convert.formats import FORMATS, open_source
from titan_ckpt.convert.source import AnySpec, StripPrefix, TensorSource
from titan_ckpt.format.json_values import encode
from titan_ckpt.format.safetensors_header import dtype_name
from titan_ckpt.messages import printable

_ELEMENTS = 1 << 24  # compared at a time, so that the comparison needs little memory besides the tensors


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("a", metavar="A", help="a checkpoint of titan-ckpt or of another format")
    parser.add_argument("b", metavar="B", help="the checkpoint to compare it with")
    parser.add_argument("--prefix", default="", help="compare only tensors whose names start with this, e.g. model/")
    parser.add_argument("--from-a", choices=FORMATS, help="format of A (default: detected)")
    parser.add_argument("--from-b", choices=FORMATS, help="format of B (default: detected)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print one line per difference; bit-identical tensors are only counted."""
    a: TensorSource = open_source(arguments.a, arguments.from_a)
    b: TensorSource = open_source(arguments.b, arguments.from_b)
    if arguments.prefix:
        a, b = StripPrefix(a, arguments.prefix), StripPrefix(b, arguments.prefix)
    lines = [f"only in A: {name}" for name in a.tensors if name not in b.tensors]
    lines += [f"only in B: {name}" for name in b.tensors if name not in a.tensors]
    lines += _compare_values(a, b)
    common = [name for name in a.tensors if name in b.tensors]
    for line in lines:
        print(printable(line))
    differing = 0
    for name in common:
        difference = _compare_tensor(a, b, name)
        if difference:
            differing += 1
            print(printable(f"{name}: {difference}"))
    equal = len(common) - differing
    print(f"{equal} tensors bit-identical, {differing} differ, {len(lines)} other differences")
    return 1 if differing or lines else 0


def _compare_values(a: TensorSource, b: TensorSource) -> list[str]:
    lines = []
    for name in sorted({*a.values, *b.values}):
        if name not in a.values or name not in b.values:
            lines.append(f"only in {'A' if name in a.values else 'B'}: the value {name}")
        elif _text(a.values[name], name) != _text(b.values[name], name):
            lines.append(f"the value {name} differs")
    return lines


def _text(value: Any, name: str) -> str:
    return json.dumps(encode(value, name), sort_keys=True)


def _compare_tensor(a: TensorSource, b: TensorSource, name: str) -> str:
    one, other = a.tensors[name], b.tensors[name]
    if tuple(one.shape) != tuple(other.shape):
        return f"{_kind(one)} in A, {_kind(other)} in B"
    first, second = a.read(name), b.read(name)
    if one.dtype == other.dtype and torch.equal(_bits(first), _bits(second)):
        return ""
    largest, incomparable = _largest_difference(first, second)
    text = f"max abs difference {largest:g}" + (f", {incomparable} not comparable (NaN, inf)" if incomparable else "")
    return text if one.dtype == other.dtype else f"{_kind(one)} in A, {_kind(other)} in B, {text}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _largest_difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, int]:
    """Return the largest absolute difference of finite elements, and the number of others that differ."""
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    largest, incomparable = 0.0, 0
    for one, other in zip(torch.split(a.reshape(-1), _ELEMENTS), torch.split(b.reshape(-1), _ELEMENTS), strict=True):
        x, y = one.to(wide), other.to(wide)
        finite = x.isfinite() & y.isfinite()
        incomparable += int((~finite & ~((x == y) | (x.isnan() & y.isnan()))).sum())
        gap = (x - y)[finite].abs()
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    return largest, incomparable


def _kind(spec: AnySpec) -> str:
    return f"{dtype_name(spec.dtype)} {list(spec.shape)}"
