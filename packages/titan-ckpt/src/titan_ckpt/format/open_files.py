"""The open files of one checkpoint: each opened once, its header checked against the manifest and the index."""

import threading
from types import TracebackType

from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.index import Chunk, TensorSpec
from titan_ckpt.format.manifest import Manifest
from titan_ckpt.format.safetensors_header import Entry, read_header
from titan_ckpt.storage.base import SourceFile, Storage


class TensorFiles:
    """The open safetensors files of one checkpoint; thread-safe."""

    def __init__(self, storage: Storage, name: str, manifest: Manifest) -> None:
        self.parallel = storage.parallel
        self.name = name
        self._storage, self._manifest = storage, manifest
        self._open: dict[str, tuple[SourceFile, dict[str, Entry]]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, file: str) -> tuple[SourceFile, dict[str, Entry]]:
        """Return an open file and its header.

        Raises:
            CheckpointError: If it is missing, not as long as the manifest says, or not a valid safetensors file.
        """
        with self._lock:
            if file not in self._open:
                try:
                    source = self._storage.open(f"{self.name}/{file}")
                except OSError as error:
                    problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
                    raise CheckpointError(f"{file} {problem}") from error
                size = self._manifest.files[file].size
                try:
                    if source.size != size:
                        raise CheckpointError(f"{file} has {source.size} bytes instead of {size}")
                    self._open[file] = source, read_header(source, file)
                except BaseException:
                    source.close()
                    raise
            return self._open[file]

    def entry_of(self, name: str, spec: TensorSpec, chunk: Chunk, piece_bytes: int) -> Entry:
        """Return where a chunk is stored in its file.

        Args:
            name: The tensor, for the message.
            spec: Its dtype and shape according to the index.
            chunk: The chunk.
            piece_bytes: Bytes per checksum.

        Raises:
            CheckpointError: If the file's header and the index disagree.
        """
        entry = self[chunk.file][1].get(chunk.key)
        if entry is None or (entry.dtype, entry.shape) != (spec.dtype, chunk.lengths):
            found = "nothing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
            raise CheckpointError(
                f"{chunk.file} holds {found} under {chunk.key!r}, but state.json says {spec.dtype} "
                f"{list(chunk.lengths)} for {name}"
            )
        expected = -(-entry.nbytes // piece_bytes)
        if len(chunk.checksums) != expected:
            raise CheckpointError(
                f"state.json has {len(chunk.checksums)} checksums for {chunk.key!r}, expected {expected}: one per piece"
            )
        return entry

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for source, _ in self._open.values():
                source.close()
            self._open = {}

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
