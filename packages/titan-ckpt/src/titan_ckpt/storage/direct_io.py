"""Direct I/O (`O_DIRECT`): move bytes between disk and memory without a copy in the kernel's page cache.

That copy costs several times the CPU time of everything else in a save, and evicts what training reads. Direct I/O
needs addresses, file positions and lengths that are multiples of the block size. Whatever is not aligned, or where the
file system does not support it, the caller (`storage.local`) moves with ordinary reads and writes.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

BLOCK = 4096  # bytes: memory addresses, file positions and lengths must be multiples of this
LEAST = 1 << 20  # bytes: below this, direct I/O is not worth its overhead
_AT_ONCE = 256 << 20  # bytes per system call
_HUGE_PAGE = 2 << 20  # bytes
_UNSUPPORTED = (errno.EINVAL, errno.EFAULT, errno.ENOTSUP, errno.EPERM)


class DirectFile:
    """A second, direct handle on a file that the caller has open in the ordinary way; thread-safe."""

    def __init__(self, path: Path, flags: int) -> None:
        """Prepare; the file is opened on first use.

        Args:
            path: An existing file.
            flags: `os.O_RDONLY` or `os.O_WRONLY`.
        """
        self._path, self._flags = path, flags
        self._handle: int | None = None
        self._supported = hasattr(os, "O_DIRECT")
        self._lock = threading.Lock()

    def write(self, view: memoryview, at: int) -> int:
        """Write as much of the beginning of `view` as direct I/O can; return the number of bytes written."""
        return self._move(view, at, os.pwrite)

    def read(self, view: memoryview, at: int) -> int:
        """Fill as much of the beginning of `view` as direct I/O can; return the number of bytes read."""
        return self._move(view, at, lambda handle, part, start: os.preadv(handle, [part], start))

    def close(self) -> None:
        """Close the direct handle."""
        if self._handle is not None:
            os.close(self._handle)

    def _move(self, view: memoryview, at: int, move: Callable[[int, memoryview, int], int]) -> int:
        length = min(len(view) // BLOCK * BLOCK, _AT_ONCE)
        if not self._supported or length < LEAST or at % BLOCK or _address(view) % BLOCK:
            return 0
        handle = self._opened()
        if handle is None:
            return 0
        try:
            return move(handle, view[:length], at)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._supported = False  # not on this file system, or not with this kind of memory
            return 0

    def _opened(self) -> int | None:
        with self._lock:
            if self._handle is None and self._supported:
                try:
                    self._handle = os.open(self._path, self._flags | os.O_DIRECT)
                except OSError:  # unsupported, or the file was deleted meanwhile: the caller still has it open
                    self._supported = False
            return self._handle


def machine_id() -> str:
    """Return an identifier of the running kernel. Containers that share it (and its page cache) return the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def allocate_buffer(nbytes: int) -> memoryview:
    """Allocate memory to read into, in huge pages where available: a disk fills few large pages faster than many small.

    Args:
        nbytes: The size.

    Returns:
        The memory, aligned for direct I/O when it is at least one huge page.
    """
    if nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(nbytes))
    mapping = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    start = -_address(memoryview(mapping)) % _HUGE_PAGE
    return memoryview(mapping)[start : start + nbytes]


def is_cached(handle: int, at: int) -> bool:
    """Return whether a page of a file is in the kernel's page cache, without causing it to be read.

    Uses mincore(2). A non-blocking read (`RWF_NOWAIT`) would not do: it starts a read-ahead, and finds the page cached
    where the disk is fast.

    Args:
        handle: The open file.
        at: Position of a byte in the page.

    Returns:
        Whether the page is cached. For files that this user may only read, Linux always reports that it is.
    """
    if not sys.platform.startswith("linux"):
        return False
    start = at // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    resident = (ctypes.c_ubyte * 1)()
    try:
        mapped = mmap.mmap(handle, at - start + 1, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
    except (OSError, ValueError):  # a file system without mmap, or a file that was truncated meanwhile
        return False
    with mapped:
        address = _address(memoryview(mapped)) + (at - start) // mmap.PAGESIZE * mmap.PAGESIZE
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), resident)
    return failed == 0 and bool(resident[0] & 1)


def _address(view: memoryview) -> int:
    """Return the memory address of a buffer."""
    return np.frombuffer(view, dtype=np.uint8).ctypes.data
