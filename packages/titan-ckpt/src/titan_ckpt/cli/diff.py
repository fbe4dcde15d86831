"""`titan-ckpt diff`: how two checkpoints differ."""

import argparse
import json
from typing import Any

import torch

from titan_ckpt.cli._text import printable
from titan_ckpt.convert.formats import FORMATS, open_source
from titan_ckpt.convert.source import AnySpec, TensorSource, Under
from titan_ckpt.format.json_values import encode
from titan_ckpt.format.safetensors_header import dtype_name

_ROWS = 1 << 24  # elements compared at a time, so that the comparison takes little memory besides the tensors


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("a", metavar="A", help="a checkpoint of this package or another format")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--prefix", default="", help="compare only tensors whose names begin so, e.g. model/")
    parser.add_argument("--from-a", choices=FORMATS, help="the format of A; found out if not given")
    parser.add_argument("--from-b", choices=FORMATS, help="the format of B; found out if not given")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compare; a line for each difference, bit-equal tensors are not mentioned."""
    a: TensorSource = open_source(arguments.a, arguments.from_a)
    b: TensorSource = open_source(arguments.b, arguments.from_b)
    if arguments.prefix:
        a, b = Under(a, arguments.prefix), Under(b, arguments.prefix)
    lines = [f"only in A: {name}" for name in a.tensors if name not in b.tensors]
    lines += [f"only in B: {name}" for name in b.tensors if name not in a.tensors]
    lines += _values(a, b)
    common = [name for name in a.tensors if name in b.tensors]
    for line in lines:
        print(printable(line))
    differing = 0
    for name in common:
        told = _compared(a, b, name)
        if told:
            differing += 1
            print(printable(f"{name}: {told}"))
    equal = len(common) - differing
    print(f"{equal} tensors equal to the bit, {differing} differ, {len(lines)} other differences")
    return 1 if differing or lines else 0


def _values(a: TensorSource, b: TensorSource) -> list[str]:
    lines = []
    for name in sorted({*a.values, *b.values}):
        if name not in a.values or name not in b.values:
            lines.append(f"only in {'A' if name in a.values else 'B'}: the value {name}")
        elif _text(a.values[name], name) != _text(b.values[name], name):
            lines.append(f"the value {name} differs")
    return lines


def _text(value: Any, name: str) -> str:
    return json.dumps(encode(value, name), sort_keys=True)


def _compared(a: TensorSource, b: TensorSource, name: str) -> str:
    one, other = a.tensors[name], b.tensors[name]
    if tuple(one.shape) != tuple(other.shape):
        return f"{_kind(one)} in A, {_kind(other)} in B"
    first, second = a.read(name), b.read(name)
    if one.dtype == other.dtype and torch.equal(_bits(first), _bits(second)):
        return ""
    difference, unlike = _difference(first, second)
    told = f"max abs difference {difference:g}" + (f", {unlike} not comparable (NaN, infinite)" if unlike else "")
    return told if one.dtype == other.dtype else f"{_kind(one)} in A, {_kind(other)} in B, {told}"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, int]:
    """Return the largest absolute difference of what is finite, and how many elements differ where one is not."""
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    largest, unlike = 0.0, 0
    for one, other in zip(torch.split(a.reshape(-1), _ROWS), torch.split(b.reshape(-1), _ROWS), strict=True):
        x, y = one.to(wide), other.to(wide)
        finite = x.isfinite() & y.isfinite()
        unlike += int((~finite & ~((x == y) | (x.isnan() & y.isnan()))).sum())
        gap = (x - y)[finite].abs()
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    return largest, unlike


def _kind(spec: AnySpec) -> str:
    return f"{dtype_name(spec.dtype)} {list(spec.shape)}"
