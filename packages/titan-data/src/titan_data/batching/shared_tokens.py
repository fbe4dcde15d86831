"""Tokenizing each text once on a machine, though each of its ranks needs to know how long all documents are.

The ids of some texts are a function of the texts and the tokenizer: so whoever comes first puts them into a file that
is named by a digest of both, and the others read it. Whatever goes wrong with the files, each loader can tokenize for
itself: sharing saves time and never changes an id.
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

_KEPT_BYTES = 128 << 20  # of a loader's own files: far more than others are behind it
_LEFT_BEHIND_SECONDS = 600.0  # files of that age are of a job that was killed
_PATIENCE_SECONDS = 20.0  # for another's tokenizing of one block
_POLL_SECONDS = 0.002

_Documents = list[npt.NDArray[np.int32]]
_log = logging.getLogger(__name__)


class TokenShare:
    """A folder through which the loaders of one machine, and of one job, share what they tokenize.

    Each loader keeps the newest of its own files and removes them when it is freed.

    Args:
        folder: made if it is not there, for this user alone.
        tokenizer: turns texts into ids.

    Raises:
        DataError: the folder cannot be made, or belongs to somebody else.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        self._folder = Path(folder).expanduser()
        self._tokenizer = tokenizer
        self._written: deque[tuple[Path, int]] = deque()
        self._lock = threading.Lock()  # of `_written`: a loader's workers all share
        self._warned = False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if hasattr(os, "getuid") and self._folder.stat().st_uid != os.getuid():
                raise DataError(f"the folder {folder} to share tokens in belongs to another user: give another one")
            _sweep(self._folder)
        except OSError as error:
            raise DataError(f"the folder {folder} to share tokens in cannot be used: {error.strerror}") from None
        weakref.finalize(self, _remove, self._folder, self._written)

    def encode(self, texts: Sequence[str]) -> _Documents:
        """Return what `encode_documents` returns: from another loader, or for others to read.

        Raises:
            DataError: the tokenizer gave an id outside of its vocabulary.
        """
        path = self._folder / self._name(texts)
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
                    return self._encode(texts)  # whoever claimed it is slow, or is no more
                time.sleep(_POLL_SECONDS)
            return found
        except OSError as error:
            if not self._warned:
                _log.warning("tokens cannot be shared in %s (%s): each rank tokenizes for itself", self._folder, error)
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
        lengths = np.array([len(documents), *map(len, documents)], dtype=np.int32)
        data = np.concatenate([lengths, *documents])
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".part", delete=False) as out:
            try:
                data.tofile(out)
                out.close()
                os.replace(out.name, path)
            except BaseException:
                os.unlink(out.name)
                raise
        with self._lock:
            self._written.append((path, data.nbytes))
            while sum(size for _, size in self._written) > _KEPT_BYTES:
                self._written.popleft()[0].unlink(missing_ok=True)


def _read(path: Path, count: int) -> _Documents | None:
    """Read the ids of `count` documents; None if there is no such file."""
    try:
        data = np.fromfile(path, dtype=np.int32)
    except FileNotFoundError:
        return None
    if len(data) <= count or data[0] != count or len(data) != 1 + count + int(data[1 : 1 + count].sum(dtype=np.int64)):
        return None  # cut off by a full disk, say
    ends = (1 + count + np.cumsum(data[1 : 1 + count], dtype=np.int64)).tolist()
    return [data[begin:end] for begin, end in zip([1 + count, *ends], ends, strict=False)]


def _claim(path: Path) -> bool:
    """Try to be the one who tokenizes."""
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


def _sweep(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix in (".ids", ".claim", ".part") and _age(path) > _LEFT_BEHIND_SECONDS:
            path.unlink(missing_ok=True)


def _remove(folder: Path, written: deque[tuple[Path, int]]) -> None:
    with contextlib.suppress(OSError):
        for path, _ in written:
            path.unlink(missing_ok=True)
        folder.rmdir()  # by the last of them
