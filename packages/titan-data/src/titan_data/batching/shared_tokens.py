"""Tokenize each text once per machine, although each of its ranks needs the lengths of all documents.

The ids of a block of texts are a function of the texts and the tokenizer: so the first rank writes them to a file named
by a digest of both, and the others read it. If anything goes wrong with the files, each loader tokenizes for itself:
sharing saves time and never changes an id. Called by the text feeds in place of `encode_documents`.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from titan_data.batching.documents import encode_documents
from titan_data.errors import DataError
from titan_data.tokenizers.base import Tokenizer

_KEPT_BYTES = 128 << 20  # of a loader's own files: far more than the other ranks are behind
_STALE_SECONDS = 600.0  # files of that age are left over from a job that was killed
_PATIENCE_SECONDS = 20.0  # how long to wait for another rank to tokenize a block
_POLL_SECONDS = 0.002

_Documents = list[npt.NDArray[np.int32]]
_log = logging.getLogger(__name__)


class SharedTokens:
    """A directory through which the loaders of one job on one machine share tokenized texts.

    Each loader keeps the newest of its own files and removes them when it is freed.

    Args:
        directory: Created if missing, readable by this user only.
        tokenizer: Turns texts into ids.

    Raises:
        DataError: If the directory cannot be created, or belongs to another user.
    """

    def __init__(self, directory: str | Path, tokenizer: Tokenizer) -> None:
        self._directory = Path(directory).expanduser()
        self._tokenizer = tokenizer
        self._written: deque[tuple[Path, int]] = deque()
        self._lock = threading.Lock()  # guards `_written`, which the loader's worker threads share
        self._warned = False
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if hasattr(os, "getuid") and self._directory.stat().st_uid != os.getuid():
                raise DataError(f"share_directory {directory} belongs to another user: choose another directory")
            _remove_stale(self._directory)
        except OSError as error:
            raise DataError(f"share_directory {directory} cannot be used: {error.strerror}") from None
        weakref.finalize(self, _remove, self._directory, self._written)

    def encode(self, texts: Sequence[str]) -> _Documents:
        """Return what `encode_documents` returns: read from another loader's file, or tokenized and written to one.

        Raises:
            DataError: If an id is outside the tokenizer's vocabulary.
        """
        path = self._directory / self._name(texts)
        claim = path.with_suffix(".claim")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            while (found := _read(path, len(texts))) is None:
                if _claim(claim):
                    try:
                        documents = _read(path, len(texts)) or self._encode(texts)
                        self._publish(path, documents)
                        return documents
                    finally:
                        claim.unlink(missing_ok=True)
                if time.monotonic() > deadline or _age(claim) > _PATIENCE_SECONDS:
                    return self._encode(texts)  # the process that claimed it is slow or has died
                time.sleep(_POLL_SECONDS)
            return found
        except OSError as error:
            if not self._warned:
                _log.warning(
                    "tokens cannot be shared in %s (%s): each rank tokenizes for itself", self._directory, error
                )
                self._warned = True
            return self._encode(texts)

    def _encode(self, texts: Sequence[str]) -> _Documents:
        return encode_documents(self._tokenizer, texts)

    def _name(self, texts: Sequence[str]) -> str:
        digest = hashlib.blake2b(self._tokenizer.fingerprint.encode(), digest_size=20)
        for text in texts:
            data = text.encode("utf-8", errors="surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return f"{digest.hexdigest()}.ids"

    def _publish(self, path: Path, documents: _Documents) -> None:
        """Write a file atomically, and remove this loader's oldest files beyond the limit."""
        lengths = np.array([len(documents), *map(len, documents)], dtype=np.int32)
        data = np.concatenate([lengths, *documents])
        with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".part", delete=False) as out:
            part = Path(out.name)
            try:
                data.tofile(out)
                out.close()
                part.replace(path)
            except BaseException:
                part.unlink()
                raise
        with self._lock:
            self._written.append((path, data.nbytes))
            while sum(size for _, size in self._written) > _KEPT_BYTES:
                self._written.popleft()[0].unlink(missing_ok=True)


def _read(path: Path, count: int) -> _Documents | None:
    """Read the ids of `count` documents; None if the file is missing or incomplete."""
    try:
        data = np.fromfile(path, dtype=np.int32)
    except FileNotFoundError:
        return None
    if len(data) <= count or data[0] != count or len(data) != 1 + count + int(data[1 : 1 + count].sum(dtype=np.int64)):
        return None  # truncated, by a full disk for example
    ends = (1 + count + np.cumsum(data[1 : 1 + count], dtype=np.int64)).tolist()
    return [data[begin:end] for begin, end in zip([1 + count, *ends], ends, strict=False)]


def _claim(path: Path) -> bool:
    """Create the claim file; False if another process has it and is tokenizing."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_stale(directory: Path) -> None:
    for path in directory.iterdir():
        if path.suffix in (".ids", ".claim", ".part") and _age(path) > _STALE_SECONDS:
            path.unlink(missing_ok=True)


def _remove(directory: Path, written: deque[tuple[Path, int]]) -> None:
    with contextlib.suppress(OSError):
        for path, _ in written:
            path.unlink(missing_ok=True)
        directory.rmdir()  # succeeds for the last loader
