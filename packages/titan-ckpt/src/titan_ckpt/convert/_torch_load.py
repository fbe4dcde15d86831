"""Files of `torch.save`, read with torch's weights-only unpickler, and checked for size before and after.

That unpickler runs nothing but the code that rebuilds tensors and plain containers. It still trusts the file's sizes:
it makes a bytearray of any length, a tensor of a terabyte over four bytes with stride 0, copies of one list a million
times. So the pickle in the file is first read with inert records (`_torch_scan`), which allows only what rebuilds
dense tensors and plain values, in proportion to its length. What it loads is checked against the bytes of the file.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from titan_ckpt.convert._torch_scan import scan_pickle
from titan_ckpt.errors import CheckpointError
from titan_ckpt.messages import reason_of


def load_entry(file: Path | IO[bytes], size: int, what: str) -> Any:
    """Read a file of `torch.save`, or one embedded in another file.

    Args:
        file: Its path, to memory-map it instead of reading it; or a stream over just its bytes.
        size: Its size in bytes.
        what: What to call it in messages.

    Returns:
        Containers, plain values and CPU tensors, each tensor no larger than its data in the file.

    Raises:
        CheckpointError: If it is corrupt, holds anything else, or needs more memory than its own size.
    """
    try:
        scan_pickle(_read_pickle(file, size))
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path))
        _check_tensors(loaded)
        return loaded
    except CheckpointError as error:
        raise CheckpointError(f"{what} is refused: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{what} is refused: {_reason(error)}. Nothing was executed") from error
    except Exception as error:  # a corrupt archive can make torch raise anything
        raise CheckpointError(f"{what} cannot be read ({_reason(error)})") from error


def _read_pickle(file: Path | IO[bytes], size: int) -> bytes:
    """Check the archive, and return the pickle in it."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_entries(entries, size)
            pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(f"it holds {len(pickles)} entries data.pkl instead of one")
            data = archive.read(pickles[0])
    except zipfile.BadZipFile:
        raise CheckpointError(
            "it is not a zip archive, the format of torch.save since torch 1.6. If you trust it, load it with torch "
            "and save it again"
        ) from None
    if not isinstance(file, Path):
        file.seek(0)
    return data


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError("it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise CheckpointError("its entries claim more bytes than the file has")
    if len({entry.filename for entry in entries}) != len(entries):
        raise CheckpointError("it holds two entries of the same name")


def _check_tensors(loaded: Any) -> None:
    """Walk the containers, visiting each object once, and check the tensors."""
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
        raise CheckpointError(f"it holds a {type(tensor).__name__} of layout {tensor.layout}: expected dense tensors")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"it holds a tensor of shape {list(tensor.shape)} that is larger than its data")


def _reason(error: Exception) -> str:
    """Return the part of torch's message that says what is wrong, without its advice to load the file anyway."""
    found = re.search(r"WeightsUnpickler error: *(.+)|(Trying to load .+)", str(error))
    if found:
        return (found[1] or found[2]).strip().rstrip(".")
    return reason_of(error).split("\n")[0].rstrip(".")
