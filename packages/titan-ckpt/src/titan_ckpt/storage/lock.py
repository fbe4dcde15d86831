"""The lock of a checkpoint directory: one job writes to it at a time.

The lock is a file that names its holder, who rewrites it every few seconds (a heartbeat). Another job that finds it
decides whether the holder is alive: on the same machine by looking at the process, which also recognizes a `kill -9`;
from another machine by watching whether the file still changes. So a killed job never blocks others for long, a live
one is never disturbed, and clocks of different machines are never compared.

Called by `Checkpointer.acquire_lock`, `titan-ckpt prune` and the importer; `confirm` is called before every
publication.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
import weakref
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from titan_ckpt.errors import CheckpointError
from titan_ckpt.messages import get_logger, reason_of
from titan_ckpt.storage.base import DamagedFileError, Storage
from titan_ckpt.storage.direct_io import machine_id

LOCK = ".lock"
BEAT_SECONDS = 10.0
_LIMIT = 1 << 16  # bytes of a lock file
_DAMAGED: dict[str, Any] = {"damaged": True}  # stands for the content of a lock file that is none; compared by identity
PATIENCE_SECONDS = 35.0  # three heartbeats, and time for another machine to see them

logger = get_logger(__name__)


class DirectoryLock:
    """The exclusive right to write to a directory. It ends with `release`, with the object, or with the process."""

    def __init__(self, storage: Storage, *, beat: float = BEAT_SECONDS, patience: float = PATIENCE_SECONDS) -> None:
        """Acquire the lock.

        Args:
            storage: The directory.
            beat: Seconds between heartbeats.
            patience: Seconds to watch a holder on another machine before it is considered dead.

        Raises:
            CheckpointError: If another live job holds the lock.
        """
        self._storage = storage
        self._me = {
            **_identity(),
            "token": secrets.token_hex(8),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._acquired = True  # unless the lock file cannot be written
        self._stop = threading.Event()
        beats = threading.Thread(
            target=_beat, args=(storage, self._me, self._stop, beat), daemon=True, name="titan-ckpt-lock"
        )
        self._beats = beats
        # Before there is anything to release, so that nothing stays behind if an interrupt ends the next lines.
        self._end = weakref.finalize(self, _release, storage, self._me, self._stop, beats)
        try:
            self._acquire(patience)
            if self._acquired:
                beats.start()
        except BaseException:
            self.release()
            raise

    def confirm(self) -> None:
        """Check that the lock is still held; called before anything is published.

        Raises:
            CheckpointError: If another job has taken the lock.
        """
        if not self._acquired:
            return
        holder = _holder_in(self._storage)
        if not holder and self._storage.create_once(LOCK, _content(self._me, 0)):
            return  # lock file deleted but not taken: recreated
        if holder is _DAMAGED:
            self._repair()
            return
        if holder.get("token") != self._me["token"]:
            raise CheckpointError(
                f"{self._storage.url}: another job took the lock while this one sent no heartbeats: "
                f"{_describe(holder)}; stop one of the two jobs"
            )

    def release(self) -> None:
        """Release the lock; a second call does nothing. An interrupted one can be repeated."""
        if self._end.alive:
            _release(self._storage, self._me, self._stop, self._beats)
            self._end.detach()

    def _acquire(self, patience: float) -> None:
        while not self._storage.create_once(LOCK, _content(self._me, 0)):
            holder = _holder_in(self._storage)
            if holder is _DAMAGED:
                time.sleep(min(1.0, patience / 10))  # on a store that does not write atomically it may become valid
                if _holder_in(self._storage) is not _DAMAGED:
                    continue
                self._repair()
                return
            if holder and not self._is_dead(holder, patience):
                raise CheckpointError(
                    f"{self._storage.url} is locked by another job: {_describe(holder)}; {_advice(holder, self._me)}"
                )
            if holder:
                logger.warning("%s: took over the lock of a dead job: %s", self._storage.url, _describe(holder))
            # If two jobs reach this line at once, the later deletes the lock of the earlier; `confirm` detects that.
            if _holder_in(self._storage) == holder:
                self._storage.delete(LOCK)

    def _repair(self) -> None:
        """Replace a lock file that says nothing about a holder; work without a lock if that is impossible."""
        try:
            self._storage.replace(LOCK, _content(self._me, 0))
            logger.warning("%s/%s was damaged: replaced", self._storage.url, LOCK)
        except OSError as error:
            self._acquired = False
            logger.warning(
                "%s/%s is damaged and cannot be replaced (%s): this job goes on without a lock, so no other job is "
                "kept from writing here; delete it",
                self._storage.url,
                LOCK,
                reason_of(error),
            )

    def _is_dead(self, holder: dict[str, Any], patience: float) -> bool:
        if all(holder.get(key) == self._me[key] for key in ("host", "boot", "namespace")):
            return not _is_running(holder.get("pid"), holder.get("started"))
        logger.warning(
            "%s is locked by %s; watching for %.0f s for a heartbeat", self._storage.url, _describe(holder), patience
        )
        until = time.monotonic() + patience
        while time.monotonic() < until:
            time.sleep(min(1.0, patience / 10))
            if _holder_in(self._storage) != holder:  # a heartbeat, or the lock was released
                return False
        return True


def _beat(storage: Storage, me: dict[str, Any], stop: threading.Event, seconds: float) -> None:
    beats = 0
    while not stop.wait(seconds):
        beats += 1
        with contextlib.suppress(Exception):  # a missed heartbeat is harmless; `confirm` detects a lost lock
            holder = _holder_in(storage)
            if holder is not _DAMAGED and holder.get("token") != me["token"]:
                return
            storage.replace(LOCK, _content(me, beats))


def _release(storage: Storage, me: dict[str, Any], stop: threading.Event, beats: threading.Thread) -> None:
    stop.set()
    if beats.is_alive() and beats is not threading.current_thread():
        beats.join()
    with contextlib.suppress(Exception):
        if os.getpid() == me["pid"] and _holder_in(storage).get("token") == me["token"]:
            storage.delete(LOCK)


def _content(me: dict[str, Any], beats: int) -> bytes:
    return json.dumps({**me, "beats": beats}).encode()


def _holder_in(storage: Storage) -> dict[str, Any]:
    """Return the content of the lock file; empty if there is none, `_DAMAGED` if it holds something else."""
    try:
        holder = json.loads(storage.read(LOCK, most=_LIMIT))
    except FileNotFoundError:
        return {}
    except (DamagedFileError, ValueError, RecursionError):
        return _DAMAGED
    return holder if isinstance(holder, dict) and holder else _DAMAGED


def _advice(holder: dict[str, Any], me: dict[str, Any]) -> str:
    if all(holder.get(key) == me[key] for key in ("host", "boot", "namespace", "pid", "started")):
        return "this process itself holds it: close() its other Checkpointer first"
    return "stop that job, or give this one another directory: two jobs would delete each other's checkpoints"


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": machine_id(),
        "namespace": _read_link("/proc/self/ns/pid"),  # process ids differ between containers
        "pid": pid,
        "started": _start_time_of(pid),
    }


def _is_running(pid: Any, started: Any) -> bool:
    """Return whether a process is alive; its start time tells it from a newer process with the same id."""
    if type(pid) is not int or not 0 < pid < 1 << 31:
        return False
    if started is not None:
        return bool(_start_time_of(pid) == started)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _start_time_of(pid: int) -> str | None:
    """Return a process's start time in kernel ticks; None if it is dead or the system does not report it."""
    stat = _read_line(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split() if stat else []
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def _read_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _read_link(path: str) -> str | None:
    try:
        return str(Path(path).readlink())
    except OSError:
        return None
