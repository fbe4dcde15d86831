"""Writing files in a process of their own, so that training shares neither its interpreter nor its lock with them.

The process gets its orders on standard input, one JSON object a line, and answers likewise. What is to be written is in
memory that both see. It ends when its input does, and so with the process that started it, however that ends.
"""

import json
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError
from titan_ckpt.save.file_writer import WrittenFile, write_file
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.open import open_storage

# This process gets the package from where the other one has it, whatever its path of modules is, and nothing else: no
# torch, whose seconds and hundreds of MiB a process that writes bytes has no use for.
_START = """
import sys, types
package = types.ModuleType("titan_ckpt")
package.__path__ = [sys.argv[1]]
sys.modules["titan_ckpt"] = package
from titan_ckpt.save.writer_process import serve
serve(sys.argv[2], int(sys.argv[3]))
"""


class WriterProcess:
    """A process that writes files from shared memory."""

    def __init__(self, url: str, handle: int) -> None:
        """Start it; it is ready a moment later, when `write` first waits for it.

        Args:
            url: the folder it writes to.
            handle: the memory, as an open file.
        """
        command = [sys.executable, "-c", _START, str(Path(__file__).parent.parent), url, str(handle)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[handle], text=True
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def write(self, path: str, header: bytes, start: int, lengths: list[int]) -> WrittenFile:
        """Write one file.

        Args:
            path: where, relative to the folder.
            header: its first bytes.
            start: where its chunks begin in the memory.
            lengths: how many bytes each chunk has; they follow one another.

        Returns:
            Its size and checksums.

        Raises:
            CheckpointError: when the process could not write it, or died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"path": path, "header": header.decode("latin-1"), "start": start, "lengths": lengths}
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except (OSError, ValueError):
            answer = ""
        if not answer:
            raise CheckpointError(f"the process that writes checkpoints died (exit code {self._process.wait()})")
        told = json.loads(answer)
        if "failure" in told:
            raise CheckpointError(told["failure"])
        return WrittenFile(told["size"], told["checksum"], [tuple(hashes) for hashes in told["pieces"]])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve(url: str, handle: int) -> None:
    """Be that process.

    Args:
        url: the folder it writes to.
        handle: the memory, as an open file.
    """
    storage = open_storage(url)
    for line in sys.stdin:
        try:
            answer = _written(storage, handle, json.loads(line))
        except Exception as error:
            told = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            answer = {"failure": told}
        print(json.dumps(answer), flush=True)


def _written(storage: Storage, handle: int, order: dict[str, Any]) -> dict[str, Any]:
    # Not closed but let go of: an error that is on its way may still hold views into it, and closing would hide it.
    memory = memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ))
    start, lengths = order["start"], order["lengths"]
    run = memory[start : start + sum(lengths)]
    written = write_file(storage, order["path"], order["header"].encode("latin-1"), [(run, lengths)])
    return {"size": written.size, "checksum": written.checksum, "pieces": written.pieces}
