"""One job writes to a folder at a time.

A file in the folder says who holds it, and is written anew every few seconds while the holder lives. Whoever finds it
judges the holder: on the same machine by its process, which a `kill -9` ends as well; from another machine by watching
whether the file still changes. So a killed job blocks nobody for long, a live one is never joined, and no clocks are
compared.
"""

import contextlib
import json
import logging
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
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.direct_io import machine

LOCK = ".lock"
BEAT_SECONDS = 10.0
PATIENCE_SECONDS = 35.0  # three beats, and time for them to be seen

logger = logging.getLogger(__name__)


class FolderLock:
    """The right to write to a folder. It ends with `release`, with the object, or with the process."""

    def __init__(self, storage: Storage, *, beat: float = BEAT_SECONDS, patience: float = PATIENCE_SECONDS) -> None:
        """Take the right.

        Args:
            storage: the folder.
            beat: how often to tell that this process lives, in seconds.
            patience: how long to watch a holder on another machine before it is taken for dead, in seconds.

        Raises:
            CheckpointError: when another live job holds it.
        """
        self._storage = storage
        self._me = {
            **_identity(),
            "token": secrets.token_hex(8),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._take(patience)
        self._stop = threading.Event()
        beats = threading.Thread(
            target=_beat, args=(storage, self._me, self._stop, beat), daemon=True, name="titan-ckpt-lock"
        )
        beats.start()
        self._end = weakref.finalize(self, _release, storage, self._me, self._stop, beats)

    def confirm(self) -> None:
        """See that the right is still ours; called before anything is published.

        Raises:
            CheckpointError: when another job has taken it.
        """
        holder = _holder_in(self._storage)
        if not holder and self._storage.create_once(LOCK, _content(self._me, 0)):
            return  # somebody deleted it, but nobody came
        if holder.get("token") != self._me["token"]:
            raise CheckpointError(
                f"another job took the folder {self._storage.url} while this one was silent for long: "
                f"{_told(holder)}. Stop one of the two"
            )

    def release(self) -> None:
        """Give the right back; a second call does nothing."""
        self._end()

    def _take(self, patience: float) -> None:
        while not self._storage.create_once(LOCK, _content(self._me, 0)):
            holder = _holder_in(self._storage)
            if holder and not self._is_dead(holder, patience):
                raise CheckpointError(
                    f"{self._storage.url} is being written to by another job: {_told(holder)}. "
                    f"{_advice(holder, self._me)}"
                )
            if holder:
                logger.warning("took over %s from a job that is dead: %s", self._storage.url, _told(holder))
            # Of two that come to this at once, the later deletes the lock of the earlier, which `confirm` then tells.
            if _holder_in(self._storage) == holder:
                self._storage.delete(LOCK)

    def _is_dead(self, holder: dict[str, Any], patience: float) -> bool:
        if all(holder.get(key) == self._me[key] for key in ("host", "boot", "namespace")):
            return not _runs(holder.get("pid"), holder.get("started"))
        logger.warning(
            "%s was last written to by %s; watching for %.0f s whether it lives",
            self._storage.url,
            _told(holder),
            patience,
        )
        until = time.monotonic() + patience
        while time.monotonic() < until:
            time.sleep(min(1.0, patience / 10))
            if _holder_in(self._storage) != holder:  # it beats, or it was given back
                return False
        return True


def _beat(storage: Storage, me: dict[str, Any], stop: threading.Event, seconds: float) -> None:
    beats = 0
    while not stop.wait(seconds):
        beats += 1
        with contextlib.suppress(Exception):  # a beat missed is no harm, and the next save will tell
            if _holder_in(storage).get("token") != me["token"]:
                return
            storage.replace(LOCK, _content(me, beats))


def _release(storage: Storage, me: dict[str, Any], stop: threading.Event, beats: threading.Thread) -> None:
    stop.set()
    if beats is not threading.current_thread():
        beats.join()
    with contextlib.suppress(Exception):
        if os.getpid() == me["pid"] and _holder_in(storage).get("token") == me["token"]:
            storage.delete(LOCK)


def _content(me: dict[str, Any], beats: int) -> bytes:
    return json.dumps({**me, "beats": beats}).encode()


def _holder_in(storage: Storage) -> dict[str, Any]:
    """Return what the lock says; empty when there is none, or none that reads."""
    try:
        holder = json.loads(storage.read(LOCK))
    except FileNotFoundError:
        return {}
    except ValueError:
        return {"host": "a host unknown, for the lock does not read", "pid": None}
    return holder if isinstance(holder, dict) else {}


def _advice(holder: dict[str, Any], me: dict[str, Any]) -> str:
    if all(holder.get(key) == me[key] for key in ("host", "boot", "namespace", "pid", "started")):
        return "That is this very process: close() its other Checkpointer first"
    return "Two jobs would clear away each other's checkpoints: stop that one, or give this one another folder"


def _told(holder: dict[str, Any]) -> str:
    if not holder:
        return "nobody is named in its lock"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": machine(),
        "namespace": _link("/proc/self/ns/pid"),  # in another container a process has another number
        "pid": pid,
        "started": _start_of(pid),
    }


def _runs(pid: Any, started: Any) -> bool:
    """Tell whether a process lives: that one, and not another that has got its number since."""
    if type(pid) is not int:
        return False
    if started is not None:
        return bool(_start_of(pid) == started)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _start_of(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks; None when it is dead or the machine does not tell."""
    stat = _line(f"/proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split() if stat else []
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def _line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
