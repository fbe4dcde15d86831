"""Verification: sizes, or every byte; per file, so that ranks and threads can share the work."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.checksum import PIECE_BYTES, checksum, pieces, running_checksum
from titan_ckpt.format.index import Chunk, Content, TensorSpec, read_content, read_state
from titan_ckpt.format.manifest import STATE, Manifest, read_manifest
from titan_ckpt.format.open_files import TensorFiles
from titan_ckpt.manage.size_check import size_problem, size_problems
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.direct_io import allocate_buffer
from titan_ckpt.storage.open import open_storage, parent_and_name
from titan_ckpt.threads import parallel_map

Level = Literal["size", "checksum"]


def verify(path: str | Path, level: Level = "size") -> list[str]:
    """Verify a checkpoint.

    Args:
        path: The checkpoint's directory, as a path or URL.
        level: "size" checks the manifest and the sizes of the files, "checksum" also reads every byte.

    Returns:
        The problems, one sentence each, with the names of corrupt tensors; empty if the checkpoint is valid.
    """
    if level not in ("size", "checksum"):
        raise CheckpointError(f'level must be "size" or "checksum", not {level!r}')
    parent, name = parent_and_name(str(path))
    storage = open_storage(parent)
    try:
        manifest = read_manifest(storage, name)
    except CheckpointError as error:
        return [str(error)]
    files = list(manifest.files)
    if level == "size":
        return size_problems(storage, name, manifest)

    def check(file: str) -> list[str]:
        return find_corruption(storage, name, manifest, [file])

    found = parallel_map(check, files, storage.parallel, "titan-ckpt-verify")
    return list(dict.fromkeys(problem for of_file in found for problem in of_file))


def find_corruption(
    storage: Storage,
    name: str,
    manifest: Manifest,
    files: Sequence[str],
    advance: Callable[[int], object] = lambda nbytes: None,
) -> list[str]:
    """Read files completely and compare them with their checksums.

    Args:
        storage: The directory of checkpoints.
        name: The checkpoint's name.
        manifest: Its manifest.
        files: The files to read.
        advance: Called with the number of bytes read since the last call.

    Returns:
        The problems, one sentence each: for tensor files, one per corrupt tensor.
    """
    found: list[str] = []
    for file in files:
        problem = size_problem(storage, name, manifest, file)
        try:
            if problem is not None:
                found.append(problem)
            elif file == STATE:
                _check_consistency(storage, name, manifest)
            elif not _matches(storage, f"{name}/{file}", manifest.files[file].checksum, advance):
                found += _corrupt_tensors(storage, name, manifest, file)
        except CheckpointError as error:
            found.append(str(error))
        except OSError as error:
            found.append(f"{file} cannot be read ({error})")
    return found


def _check_consistency(storage: Storage, name: str, manifest: Manifest) -> None:
    """Check that state.json is intact and agrees with the headers of the files it refers to."""
    content = read_content(read_state(storage, name, manifest), manifest)
    files = TensorFiles(storage, name, manifest)
    try:
        for tensor, spec in content.tensors.items():
            for chunk in spec.chunks:
                if not size_problem(storage, name, manifest, chunk.file):  # else it is reported for that file
                    files.entry_of(tensor, spec, chunk, content.piece_bytes)
    finally:
        files.close()


def _matches(storage: Storage, path: str, expected: str, advance: Callable[[int], object]) -> bool:
    source, running = storage.open(path), running_checksum()
    try:
        buffer = allocate_buffer(min(PIECE_BYTES, source.size))
        for start, stop in pieces(source.size):
            source.read_into(start, buffer[: stop - start], bypass_cache=True)
            running.update(buffer[: stop - start])
            advance(stop - start)
    finally:
        source.close()
    return running.hexdigest() == expected


def _corrupt_tensors(storage: Storage, name: str, manifest: Manifest, file: str) -> list[str]:
    """Find which tensors of a corrupt file are affected. Reads the file a second time, which is rarely needed."""
    general = [f"{file} does not match its checksum"]
    try:
        content = read_content(read_state(storage, name, manifest), manifest)
    except CheckpointError:
        return general
    found = []
    files = TensorFiles(storage, name, manifest)
    try:
        for tensor, spec in content.tensors.items():
            if any(_is_corrupt(files, content, tensor, spec, chunk) for chunk in spec.chunks if chunk.file == file):
                found.append(f"{file} does not match its checksum in the tensor {tensor}")
    except CheckpointError as error:  # the header is corrupt, so all tensors of the file are lost
        return [*general, str(error)]
    finally:
        files.close()
    return found or general


def _is_corrupt(files: TensorFiles, content: Content, tensor: str, spec: TensorSpec, chunk: Chunk) -> bool:
    entry = files.entry_of(tensor, spec, chunk, content.piece_bytes)
    source, _ = files[chunk.file]
    buffer = memoryview(bytearray(min(content.piece_bytes, entry.nbytes)))
    for number, (start, stop) in enumerate(pieces(entry.nbytes, content.piece_bytes)):
        source.read_into(entry.start + start, buffer[: stop - start])
        if checksum(buffer[: stop - start]) != chunk.checksums[number]:
            return True
    return False
