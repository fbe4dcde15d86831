"""The formats by name, and telling which one lies at a path."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from titan_ckpt.convert.dcp.metadata import METADATA
from titan_ckpt.convert.dcp.reader import DcpFolder
from titan_ckpt.convert.dcp.safetensors_reader import DcpSafetensorsFolder, is_dcp_safetensors
from titan_ckpt.convert.huggingface.reader import SINGLE, HuggingFaceFolder
from titan_ckpt.convert.huggingface.writer import INDEX
from titan_ckpt.convert.meta_llama import MetaFolder
from titan_ckpt.convert.safetensors_file import SafetensorsFile
from titan_ckpt.convert.source import TensorSource
from titan_ckpt.convert.torch_file import TorchFile
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import MANIFEST
from titan_ckpt.load.reader import open_checkpoint

Format = Literal["titan", "hf", "dcp", "dcp-safetensors", "torch", "meta", "safetensors"]
_OPENERS: Mapping[str, Callable[[str], TensorSource]] = {
    "titan": open_checkpoint,
    "hf": HuggingFaceFolder,
    "dcp": DcpFolder,
    "dcp-safetensors": DcpSafetensorsFolder,
    "torch": TorchFile,
    "meta": MetaFolder,
    "safetensors": lambda path: SafetensorsFile(Path(path)),
}
FORMATS: tuple[str, ...] = get_args(Format)


def open_source(path: str | Path, kind: str | None = None) -> TensorSource:
    """Open weights or a checkpoint of whatever program.

    Args:
        path: the folder or file; a URL for a checkpoint of this package.
        kind: one of FORMATS; None to look which it is.

    Returns:
        The source; no tensor is read yet.

    Raises:
        CheckpointError: when nothing that can be read is there.
    """
    return _OPENERS[kind or format_at(str(path))](str(path))


def format_at(path: str) -> str:
    """Tell the format by the files that lie at a path.

    Args:
        path: the folder or file.

    Returns:
        One of FORMATS.

    Raises:
        CheckpointError: when it is none of them.
    """
    if "://" in path:
        return "titan"
    place = Path(path)
    if place.is_file():
        return "safetensors" if place.suffix == ".safetensors" else "torch"
    if not place.is_dir():
        raise CheckpointError(f"{path}: there is no such file or folder")
    marks = {MANIFEST: "titan", METADATA: "dcp", INDEX: "hf", SINGLE: "hf", "consolidated.00.pth": "meta"}
    for name, kind in marks.items():
        if (place / name).exists():
            return kind
    if is_dcp_safetensors(place):
        return "dcp-safetensors"
    steps = sorted(child.name for child in place.iterdir() if child.name.startswith("step-"))
    if steps:
        raise CheckpointError(f"{path} is a folder of checkpoints: give one of them, such as {place / steps[-1]}")
    raise CheckpointError(
        f"{path} is no checkpoint: it holds none of {', '.join(marks)}, and no safetensors files with DCP's notes"
    )


def config_of(source: TensorSource) -> Mapping[str, Any]:
    """Return what a source tells of its model: config.json, params.json, or a checkpoint's metadata."""
    if isinstance(source, HuggingFaceFolder):
        return source.config
    if isinstance(source, MetaFolder):
        return source.params
    manifest = getattr(source, "manifest", None)
    return manifest.metadata if manifest is not None else {}
