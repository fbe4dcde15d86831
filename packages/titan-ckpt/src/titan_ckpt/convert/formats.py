"""`open_source`: detect the format of weights at a path, and open them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from titan_ckpt.convert.dcp.metadata import METADATA
from titan_ckpt.convert.dcp.reader import DcpDirectory
from titan_ckpt.convert.dcp.safetensors_reader import DcpSafetensorsDirectory, is_dcp_safetensors
from titan_ckpt.convert.huggingface.reader import SINGLE, HuggingFaceDirectory
from titan_ckpt.convert.huggingface.writer import INDEX
from titan_ckpt.convert.meta_llama import MetaDirectory
from titan_ckpt.convert.safetensors_file import SafetensorsFile
from titan_ckpt.convert.source import TensorSource
from titan_ckpt.convert.torch_file import TorchFile
from titan_ckpt.errors import CheckpointError, system_errors
from titan_ckpt.format.manifest import MANIFEST
from titan_ckpt.load.reader import open_checkpoint
from titan_ckpt.messages import local_path

Format = Literal["titan", "hf", "dcp", "dcp-safetensors", "torch", "meta", "safetensors"]
_OPENERS: Mapping[str, Callable[[str], TensorSource]] = {
    "titan": open_checkpoint,
    "hf": HuggingFaceDirectory,
    "dcp": DcpDirectory,
    "dcp-safetensors": DcpSafetensorsDirectory,
    "torch": TorchFile,
    "meta": MetaDirectory,
    "safetensors": lambda path: SafetensorsFile(Path(path)),
}
FORMATS: tuple[str, ...] = get_args(Format)


def open_source(path: str | Path, kind: str | None = None) -> TensorSource:
    """Open weights or a checkpoint in any supported format.

    Args:
        path: The directory or file; for a checkpoint of this package also a URL.
        kind: One of titan, hf, dcp, dcp-safetensors, torch, meta, safetensors; None detects it.

    Returns:
        The source; no tensor is read yet.

    Raises:
        CheckpointError: If there is nothing that can be read.
    """
    text = str(path) if "://" in str(path) else str(local_path(path))
    if kind is not None and kind not in _OPENERS:
        raise CheckpointError(f"unknown format {kind!r}: give one of {', '.join(FORMATS)}, or none to detect it")
    with system_errors(f"open {path}"):
        return _OPENERS[kind or format_at(text)](text)


def format_at(path: str) -> str:
    """Detect the format from the files at a path.

    Args:
        path: The directory or file.

    Returns:
        One of FORMATS.

    Raises:
        CheckpointError: If it is none of them.
    """
    if "://" in path:
        return "titan"
    place = local_path(path)
    if place.is_file():
        return "safetensors" if place.suffix == ".safetensors" else "torch"
    if not place.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    marks = {MANIFEST: "titan", METADATA: "dcp", INDEX: "hf", SINGLE: "hf", "consolidated.00.pth": "meta"}
    for name, kind in marks.items():
        if (place / name).exists():
            return kind
    if is_dcp_safetensors(place):
        return "dcp-safetensors"
    steps = sorted(child.name for child in place.iterdir() if child.name.startswith("step-"))
    if steps:
        raise CheckpointError(f"{path} is a directory of checkpoints: give one of them, e.g. {place / steps[-1]}")
    raise CheckpointError(
        f"{path} is not a checkpoint: expected one of {', '.join(marks)}, or safetensors files with DCP's sharding info"
    )


def config_of(source: TensorSource) -> Mapping[str, Any]:
    """Return what a source says about its model: config.json, params.json, or a checkpoint's metadata."""
    if isinstance(source, HuggingFaceDirectory):
        return source.config
    if isinstance(source, MetaDirectory):
        return source.params
    manifest = getattr(source, "manifest", None)
    return manifest.metadata if manifest is not None else {}
