"""What `torch.save` wrote, read by torch's weights-only unpickler and then checked for size.

That unpickler runs nothing but what rebuilds tensors and plain containers. It still takes a file's word for sizes: a
tensor of a terabyte over four bytes that repeat, a storage that is to grow, an archive that is compressed a
thousandfold. These are refused before or right after they are read, while they are cheap.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from titan_ckpt.errors import CheckpointError


def load_entry(file: Path | IO[bytes], size: int, what: str) -> Any:
    """Read a file of `torch.save`, or one that lies within another.

    Args:
        file: its path, to map it to memory rather than to read it; or a stream over just its bytes.
        size: how long it is.
        what: what to call it in messages.

    Returns:
        Containers, plain values and CPU tensors, each tensor no larger than what the file holds for it.

    Raises:
        CheckpointError: when it is damaged, holds anything else, or asks for more memory than it is long.
    """
    try:
        _check_archive(file, size)
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path))
        _check_tensors(loaded)
        return loaded
    except CheckpointError as error:
        raise CheckpointError(f"{what} is refused: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{what} is refused: {_reason(error)}. Nothing was executed") from error
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise CheckpointError(f"{what} does not read ({type(error).__name__}: {_reason(error)})") from error


def _check_archive(file: Path | IO[bytes], size: int) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile:
        raise CheckpointError(
            "it is no zip archive, as torch.save writes since torch 1.6. If you trust it, save it anew with torch"
        ) from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError("it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise CheckpointError("its parts are longer than the whole")
    if not isinstance(file, Path):
        file.seek(0)


def _check_tensors(loaded: Any) -> None:
    """Go through the containers, each object once, and look at the tensors."""
    seen: set[int] = set()
    waiting = [loaded]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            _check_tensor(value)
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += value


def _check_tensor(tensor: torch.Tensor) -> None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(f"it holds a {type(tensor).__name__} of layout {tensor.layout}: dense tensors are wanted")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"it holds a tensor of shape {list(tensor.shape)} that is larger than its data")


def _reason(error: Exception) -> str:
    """Take the part of torch's message that says what is wrong; the rest tells how to go ahead regardless."""
    text = str(error)
    told = re.search(r"WeightsUnpickler error: *(.+)|(Trying to load .+)", text)
    return (told[1] or told[2] if told else text.split("\n")[0]).strip().rstrip(".")
