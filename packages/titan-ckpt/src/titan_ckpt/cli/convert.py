"""`titan-ckpt convert`: from one format to another, tensor by tensor."""

import argparse
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from titan_ckpt.cli._text import printable, size
from titan_ckpt.convert._json import read_json
from titan_ckpt.convert.formats import FORMATS, config_of, format_at, open_source
from titan_ckpt.convert.huggingface.writer import write_huggingface
from titan_ckpt.convert.source import Cast, TensorSource, Under, Without, size_of
from titan_ckpt.convert.titan_writer import write_titan
from titan_ckpt.convert.torch_file import export_torch
from titan_ckpt.convert.weight_map import Mapped, WeightMap
from titan_ckpt.convert.weight_map_json import read_json_map
from titan_ckpt.errors import CheckpointError

_TARGETS = ("titan", "hf", "torch", "dcp")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
# Formats of weights alone, under the names of whoever published them.
_FOREIGN = ("hf", "meta")
_STATES = ("titan", "dcp", "dcp-safetensors")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SOURCE", help="what to convert")
    parser.add_argument("target", metavar="TARGET", help="what to make; for titan, the folder of checkpoints")
    parser.add_argument("--to", required=True, choices=_TARGETS, help="the format to write")
    parser.add_argument("--from", dest="kind", choices=FORMATS, help="the format of SOURCE; found out if not given")
    parser.add_argument(
        "--map",
        metavar="MAP",
        help="weight map: a JSON file, or module:function, called with the source's config (a dict)",
    )
    parser.add_argument(
        "--direction",
        choices=("to-foreign", "to-native"),
        help="which way to use the map; if not given, to-native from hf and meta, and to-foreign from the others",
    )
    parser.add_argument(
        "--prefix",
        help="what the names of the model's tensors begin with in the titan or DCP checkpoint: taken off when reading "
        "one, put before when writing one; if not given, model/ between titan and formats of weights, else nothing",
    )
    parser.add_argument(
        "--dtype", choices=sorted(_DTYPES), help="the type of floating-point tensors; if not given, as is"
    )
    parser.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="leave out matching names")
    parser.add_argument("--config", metavar="FILE", help="hf: the config.json to write, instead of the map's")
    parser.add_argument(
        "--extra", action="append", default=[], metavar="FILE", help="hf: a file to copy, e.g. tokenizer.json"
    )
    parser.add_argument(
        "--max-file-size", default="5G", type=_bytes, help="hf: e.g. 5G, which is what it is if not given"
    )
    parser.add_argument("--step", type=int, default=0, help="titan: the step of the checkpoint; 0 if not given")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert; the target appears once it is complete."""
    kind = arguments.kind or format_at(arguments.source)
    source = open_source(arguments.source, kind)
    config = config_of(source)
    for name, reason in getattr(source, "left_out", {}).items():
        print(f"left out {printable(name)}: {printable(reason)}", file=sys.stderr)
    weight_map = None if arguments.map is None else load_map(arguments.map, config)
    taken, put = _prefixes(kind, arguments.to, arguments.prefix)
    seen: TensorSource = Under(source, taken) if taken else source
    if arguments.ignore:
        seen = Without(seen, arguments.ignore)
    if weight_map is not None:
        native = (arguments.direction or ("to-native" if kind in _FOREIGN else "to-foreign")) == "to-native"
        seen = Mapped(seen, weight_map.rules, "to_native" if native else "to_foreign")
        config = config if native else weight_map.config
    if arguments.dtype is not None:
        seen = Cast(seen, _DTYPES[arguments.dtype])
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        _write(arguments, _Watched(seen, progress), config, put)
    total = sum(size_of(spec) for spec in seen.tensors.values())
    print(f"{len(seen.tensors)} tensors, {size(total)}: {printable(arguments.target)}")
    return 0


def load_map(text: str, config: Mapping[str, Any]) -> WeightMap:
    """Get a weight map.

    Args:
        text: a JSON file, or `module:function`; modules of the working directory are found as well.
        config: what the function is called with.

    Returns:
        The map.

    Raises:
        CheckpointError: when there is none.
    """
    module, colon, function = text.partition(":")
    if not colon or not re.fullmatch(r"[\w.]+", module) or not function.isidentifier():
        return read_json_map(text)
    sys.path.insert(0, "")
    try:
        weight_map: WeightMap = getattr(importlib.import_module(module), function)(config)
    except Exception as error:  # somebody else's module: whatever it raises becomes one message
        raise CheckpointError(f"no weight map from {text}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not hasattr(weight_map, "rules") or not hasattr(weight_map, "config"):
        raise CheckpointError(f"{text} returned a {type(weight_map).__name__}, which has no rules and config")
    return weight_map


def _prefixes(kind: str, target: str, given: str | None) -> tuple[str, str]:
    """Return what to take off the source's names, and what to put before the target's."""
    if kind in _STATES and target not in _STATES:
        return ("model/" if kind == "titan" else "") if given is None else given, ""
    if kind not in _STATES and target in _STATES:
        return "", ("model/" if target == "titan" else "") if given is None else given
    return given or "", given or ""


def _write(arguments: argparse.Namespace, source: TensorSource, config: Mapping[str, Any], prefix: str) -> None:
    if arguments.to == "hf":
        told = read_json(Path(arguments.config)) if arguments.config else (dict(config) or None)
        write_huggingface(
            source, arguments.target, told, max_file_bytes=arguments.max_file_size, extra_files=arguments.extra
        )
    elif arguments.to == "torch":
        export_torch(source, arguments.target)
    elif arguments.to == "dcp":
        from titan_ckpt.convert.dcp.writer import export_dcp  # DCP brings two seconds of imports with it

        export_dcp(source, arguments.target, prefix=prefix)
    else:
        metadata = {"converted_from": str(arguments.source)}
        write_titan(source, arguments.target, arguments.step, prefix=prefix, metadata=metadata)


class _Watched:
    """A source that tells a progress bar what is read."""

    def __init__(self, source: TensorSource, progress: Progress) -> None:
        self._source, self._progress = source, progress
        self.tensors, self.values = source.tensors, source.values
        total = sum(size_of(spec) for spec in source.tensors.values())
        self._task = progress.add_task("convert", total=total)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        self._progress.advance(self._task, size_of(self.tensors[name]))
        return tensor

    def read_slice(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        return self._source.read_slice(name, offsets, sizes)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+)([KMG]?)B?", text)
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give e.g. 5G or 500M")
    return int(found[1]) * _UNITS[found[2]]
