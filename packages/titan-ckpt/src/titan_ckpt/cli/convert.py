"""`titan-ckpt convert`: convert weights or a checkpoint to another format, tensor by tensor."""

import argparse
import importlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from titan_ckpt.cli._text import size
from titan_ckpt.convert._json import read_json
from titan_ckpt.convert.formats import FORMATS, config_of, format_at, open_source
from titan_ckpt.convert.huggingface.writer import write_huggingface
from titan_ckpt.convert.source import Cast, Exclude, StripPrefix, TensorSource, size_of
from titan_ckpt.convert.titan_writer import write_titan
from titan_ckpt.convert.torch_file import export_torch
from titan_ckpt.convert.weight_map import WeightMap, through
from titan_ckpt.errors import CheckpointError
from titan_ckpt.messages import local_path, printable, reason_of

_TARGETS = ("titan", "hf", "torch", "dcp")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
# Formats that hold weights only, under external names.
_EXTERNAL = ("hf", "meta")
# Formats that hold a full training state, with prefixes in the names.
_STATES = ("titan", "dcp", "dcp-safetensors")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SOURCE", help="the weights or checkpoint to convert")
    parser.add_argument("target", metavar="TARGET", help="what to write; with --to titan a directory of checkpoints")
    parser.add_argument("--to", required=True, choices=_TARGETS, help="format to write")
    parser.add_argument("--from", dest="kind", choices=FORMATS, help="format of SOURCE (default: detected)")
    parser.add_argument(
        "--map",
        metavar="MODULE:FUNCTION",
        help="Python function that returns the weight map; it is called with the source's config (a dict)",
    )
    parser.add_argument(
        "--direction",
        choices=("to-external", "to-internal"),
        help="direction in which the map is used (default: to-internal from hf and meta, else to-external)",
    )
    parser.add_argument(
        "--prefix",
        help="prefix of the model's tensors in a titan or DCP checkpoint: removed when reading one, added when writing "
        "one (default: model/ between titan and formats of weights, otherwise none)",
    )
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="dtype of floating-point tensors (default: unchanged)")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out tensors whose names match this shell pattern; may be repeated",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="with --to hf: the config.json to write (default: the map's, or the source's)"
    )
    parser.add_argument(
        "--extra",
        action="append",
        default=[],
        metavar="FILE",
        help="with --to hf: a file to copy, e.g. tokenizer.json; may be repeated",
    )
    parser.add_argument(
        "--max-file-size",
        default="5G",
        type=_bytes,
        help="with --to hf: maximum file size in bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--step", type=int, default=0, help="with --to titan: the step of the checkpoint (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert; the target appears once it is complete."""
    kind = arguments.kind or format_at(arguments.source)
    source = open_source(arguments.source, kind)
    config = config_of(source)
    for name, reason in getattr(source, "left_out", {}).items():
        print(f"left out {printable(name)}: {printable(reason)}", file=sys.stderr)
    weight_map = None if arguments.map is None else load_map(arguments.map, config)
    removed, added = _prefixes(kind, arguments.to, arguments.prefix)
    view: TensorSource = StripPrefix(source, removed) if removed else source
    if arguments.ignore:
        view = Exclude(view, arguments.ignore)
    if weight_map is not None:
        internal = (arguments.direction or ("to-internal" if kind in _EXTERNAL else "to-external")) == "to-internal"
        view = through(view, weight_map, "to_internal" if internal else "to_external")
        config = config if internal else weight_map.config
    if arguments.dtype is not None:
        view = Cast(view, _DTYPES[arguments.dtype])
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        _write(arguments, _Watched(view, progress), config, added)
    total = sum(size_of(spec) for spec in view.tensors.values())
    print(f"{len(view.tensors)} tensors, {size(total)}: {printable(arguments.target)}")
    return 0


def load_map(text: str, config: Mapping[str, Any]) -> WeightMap:
    """Call the function that returns the weight map.

    Args:
        text: `module:function`; modules in the working directory are found as well.
        config: The argument of the function.

    Returns:
        The map.

    Raises:
        CheckpointError: If there is no such function, or it does not return a weight map.
    """
    module, colon, function = text.partition(":")
    if not colon or not re.fullmatch(r"[\w.]+", module) or not function.isidentifier():
        raise CheckpointError(f"--map {text}: expected MODULE:FUNCTION, e.g. my_maps:llama_to_hf")
    sys.path.insert(0, "")
    try:
        weight_map: WeightMap = getattr(importlib.import_module(module), function)(config)
    except Exception as error:  # user code: whatever it raises becomes one message
        raise CheckpointError(f"--map {text} failed: {reason_of(error)}") from error
    finally:
        sys.path.remove("")
    if not hasattr(weight_map, "rules") or not hasattr(weight_map, "config"):
        raise CheckpointError(f"--map {text} returned a {type(weight_map).__name__}, which has no rules and config")
    return weight_map


def _prefixes(kind: str, target: str, given: str | None) -> tuple[str, str]:
    """Return the prefix to remove from the source's names, and the one to add to the target's."""
    if kind in _STATES and target not in _STATES:
        return ("model/" if kind == "titan" else "") if given is None else given, ""
    if kind not in _STATES and target in _STATES:
        return "", ("model/" if target == "titan" else "") if given is None else given
    return given or "", given or ""


def _write(arguments: argparse.Namespace, source: TensorSource, config: Mapping[str, Any], prefix: str) -> None:
    if arguments.to == "hf":
        content = read_json(local_path(arguments.config)) if arguments.config else (dict(config) or None)
        write_huggingface(
            source, arguments.target, content, max_file_bytes=arguments.max_file_size, extra_files=arguments.extra
        )
    elif arguments.to == "torch":
        export_torch(source, arguments.target)
    elif arguments.to == "dcp":
        from titan_ckpt.convert.dcp.writer import export_dcp  # importing DCP takes two seconds

        export_dcp(source, arguments.target, prefix=prefix)
    else:
        metadata = {"converted_from": str(arguments.source)}
        write_titan(source, arguments.target, arguments.step, prefix=prefix, metadata=metadata)


class _Watched:
    """A source that reports what is read to a progress bar."""

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
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give e.g. 5G or 500M")
    return int(found[1]) * _UNITS[found[2]]
