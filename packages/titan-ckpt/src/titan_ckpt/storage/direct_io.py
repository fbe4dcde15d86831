"""Bytes that pass between a disk and memory by themselves, without a copy in the kernel's cache (`O_DIRECT`).

That copy costs several times the CPU of all the rest, and pushes out of the cache what training reads. The disk wants
addresses, places and lengths that are whole blocks; whatever does not lie so, or where a file system cannot, is for the
caller to move the usual way.
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

BLOCK = 4096  # bytes: addresses in memory, places in a file and lengths are multiples of this
LEAST = 1 << 20  # bytes: less is not worth it
_AT_ONCE = 256 << 20  # bytes
_HUGE_PAGE = 2 << 20  # bytes
_CANNOT = (errno.EINVAL, errno.EFAULT, errno.ENOTSUP, errno.EPERM)


class DirectFile:
    """The direct way to a file that the caller has open the usual way; several threads may use it."""

    def __init__(self, path: Path, flags: int) -> None:
        """Open nothing yet.

        Args:
            path: the file, which is there.
            flags: `os.O_RDONLY` or `os.O_WRONLY`.
        """
        self._path, self._flags = path, flags
        self._handle: int | None = None
        self._can = hasattr(os, "O_DIRECT")
        self._lock = threading.Lock()

    def write(self, view: memoryview, at: int) -> int:
        """Write what can be written so from the beginning of `view`; return how many bytes it was."""
        return self._move(view, at, os.pwrite)

    def read(self, view: memoryview, at: int) -> int:
        """Fill what can be filled so from the beginning of `view`; return how many bytes it was."""
        return self._move(view, at, lambda handle, part, start: os.preadv(handle, [part], start))

    def close(self) -> None:
        """Give it back."""
        if self._handle is not None:
            os.close(self._handle)

    def _move(self, view: memoryview, at: int, move: Callable[[int, memoryview, int], int]) -> int:
        length = min(len(view) // BLOCK * BLOCK, _AT_ONCE)
        if not self._can or length < LEAST or at % BLOCK or _address(view) % BLOCK:
            return 0
        handle = self._opened()
        if handle is None:
            return 0
        try:
            return move(handle, view[:length], at)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            self._can = False  # the file system cannot, or not with such memory
            return 0

    def _opened(self) -> int | None:
        with self._lock:
            if self._handle is None and self._can:
                try:
                    self._handle = os.open(self._path, self._flags | os.O_DIRECT)
                except OSError:  # the file system cannot, or the file was deleted: the caller still has it open
                    self._can = False
            return self._handle


def machine() -> str:
    """Name the running kernel of this machine; containers that share it, and its cache of files, say the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def room(nbytes: int) -> memoryview:
    """Take memory to read into, in huge pages where they can be had: a disk fills few large pieces faster than many.

    Args:
        nbytes: how much.

    Returns:
        The memory.
    """
    if nbytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(bytearray(nbytes))
    taken = mmap.mmap(-1, nbytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        taken.madvise(mmap.MADV_HUGEPAGE)
    start = -_address(memoryview(taken)) % _HUGE_PAGE
    return memoryview(taken)[start : start + nbytes]


def is_remembered(handle: int, at: int) -> bool:
    """Tell whether the kernel has a page of a file in its memory, without having it fetched.

    A read that must not wait (`RWF_NOWAIT`) is no way to ask: it makes the kernel fetch the page, and finds it there
    where the disk is quick.

    Args:
        handle: the open file.
        at: which byte the page holds.

    Returns:
        Whether it is there. Of files that this user may only read, Linux says that everything is.
    """
    if not sys.platform.startswith("linux"):
        return False
    start = at // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    there = (ctypes.c_ubyte * 1)()
    try:
        mapped = mmap.mmap(handle, at - start + 1, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
    except (OSError, ValueError):  # a file system that cannot, or a file that was cut short meanwhile
        return False
    with mapped:
        address = _address(memoryview(mapped)) + (at - start) // mmap.PAGESIZE * mmap.PAGESIZE
        told = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), there)
    return told == 0 and bool(there[0] & 1)


def _address(view: memoryview) -> int:
    """Return where in memory a buffer begins."""
    return np.frombuffer(view, dtype=np.uint8).ctypes.data
