"""Looking for damage: sizes, or every byte; file by file, so that ranks and threads can share the work."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.checksum import PIECE_BYTES, checksum, pieces, running_checksum
from titan_ckpt.format.index import Chunk, Content, TensorSpec, read_content, read_state
from titan_ckpt.format.manifest import STATE, Manifest, read_manifest
from titan_ckpt.format.open_files import TensorFiles
from titan_ckpt.manage.size_check import size_problem, wrong_sizes
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.direct_io import room
from titan_ckpt.storage.open import open_storage, parent_and_name

Level = Literal["size", "checksum"]


def verify(path: str | Path, level: Level = "size") -> list[str]:
    """Check a checkpoint.

    Args:
        path: its folder, as a path or URL.
        level: "size" looks at the manifest and the files' lengths, "checksum" also reads every byte.

    Returns:
        What is wrong with it, one sentence each, with the names of damaged tensors; empty when it is sound.
    """
    if level not in ("size", "checksum"):
        raise ValueError(f'level must be "size" or "checksum", not {level!r}')
    parent, name = parent_and_name(str(path))
    storage = open_storage(parent)
    try:
        manifest = read_manifest(storage, name)
    except CheckpointError as error:
        return [str(error)]
    files = list(manifest.files)
    if level == "size":
        return wrong_sizes(storage, name, manifest)
    with ThreadPoolExecutor(storage.parallel, thread_name_prefix="titan-ckpt-verify") as pool:
        found = pool.map(lambda file: damage_in(storage, name, manifest, [file]), files)
        return list(dict.fromkeys(told for part in found for told in part))


def damage_in(
    storage: Storage,
    name: str,
    manifest: Manifest,
    files: Sequence[str],
    advance: Callable[[int], object] = lambda nbytes: None,
) -> list[str]:
    """Read files in full and compare them with their checksums.

    Args:
        storage: the folder the checkpoint lies in.
        name: its name.
        manifest: its manifest.
        files: which of its files to read.
        advance: called with a number of bytes that have been read since the last call.

    Returns:
        What is wrong, one sentence each: for tensor files one per damaged tensor.
    """
    found: list[str] = []
    for file in files:
        told = size_problem(storage, name, manifest, file)
        try:
            if told is not None:
                found.append(told)
            elif file == STATE:
                _consistent(storage, name, manifest)
            elif not _matches(storage, f"{name}/{file}", manifest.files[file].checksum, advance):
                found += _damaged_tensors(storage, name, manifest, file)
        except CheckpointError as error:
            found.append(str(error))
        except OSError as error:
            found.append(f"{file} does not read ({error})")
    return found


def _consistent(storage: Storage, name: str, manifest: Manifest) -> None:
    """See that state.json is intact and says the same as the headers of the files it refers to."""
    content = read_content(read_state(storage, name, manifest), manifest)
    files = TensorFiles(storage, name, manifest)
    try:
        for tensor, spec in content.tensors.items():
            for chunk in spec.chunks:
                if not size_problem(storage, name, manifest, chunk.file):  # else it is told for the file itself
                    files.entry_of(tensor, spec, chunk, content.piece_bytes)
    finally:
        files.close()


def _matches(storage: Storage, path: str, expected: str, advance: Callable[[int], object]) -> bool:
    source, running = storage.open(path), running_checksum()
    try:
        buffer = room(min(PIECE_BYTES, source.size))
        for start, stop in pieces(source.size):
            source.read_into(start, buffer[: stop - start], once=True)  # and leaves the kernel's cache to others
            running.update(buffer[: stop - start])
            advance(stop - start)
    finally:
        source.close()
    return running.hexdigest() == expected


def _damaged_tensors(storage: Storage, name: str, manifest: Manifest, file: str) -> list[str]:
    """Find out which tensors a damaged file spoils; read a second time, for this is rare."""
    plain = [f"{file} does not match its checksum"]
    try:
        content = read_content(read_state(storage, name, manifest), manifest)
    except CheckpointError:
        return plain
    found = []
    files = TensorFiles(storage, name, manifest)
    try:
        for tensor, spec in content.tensors.items():
            if any(_is_damaged(files, content, tensor, spec, chunk) for chunk in spec.chunks if chunk.file == file):
                found.append(f"{file} does not match its checksum in the tensor {tensor}")
    except CheckpointError as error:  # the damage is in the header, so all of its tensors are lost
        return [*plain, str(error)]
    finally:
        files.close()
    return found or plain


def _is_damaged(files: TensorFiles, content: Content, tensor: str, spec: TensorSpec, chunk: Chunk) -> bool:
    entry = files.entry_of(tensor, spec, chunk, content.piece_bytes)
    source, _ = files[chunk.file]
    buffer = memoryview(bytearray(min(content.piece_bytes, entry.nbytes)))
    for number, (start, stop) in enumerate(pieces(entry.nbytes, content.piece_bytes)):
        source.read_into(entry.start + start, buffer[: stop - start])
        if checksum(buffer[: stop - start]) != chunk.checksums[number]:
            return True
    return False
