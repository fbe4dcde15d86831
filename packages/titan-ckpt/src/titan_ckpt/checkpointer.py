"""The Checkpointer: what a training loop calls to save at intervals and to load at the start.

It combines the other modules: `save.saving` prepares a save, `save.in_flight` runs it to its end, `load.loading` loads.
"""

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch.distributed as dist

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.load.loading import Loaded, OnCorruption, Request, load
from titan_ckpt.load.selection import Selection
from titan_ckpt.manage.lineage import finish_moves
from titan_ckpt.manage.retention import KeepBest, Retention
from titan_ckpt.save.in_flight import Flight, SaveEnd
from titan_ckpt.save.saving import Exporter, Saver, SaveSettings
from titan_ckpt.state.tree import Stateful
from titan_ckpt.storage.lock import DirectoryLock
from titan_ckpt.storage.open import open_storage


class Checkpointer:
    """Save a training state to a directory and load it back.

    If torch.distributed is initialized, all ranks must create one and call its methods together, with the same
    arguments (except for the tensors of their state), and see the same directory. Otherwise it works for the one
    process.

    Example:
        >>> with Checkpointer("runs/x/checkpoints", keep_last=3, asynchronous=True) as ckpt:
        ...     found = ckpt.load(state)  # None: the directory holds no checkpoint yet
        ...     ckpt.save(100, state, metadata={"tokens_seen": 4096})
        >>> Checkpointer("runs/x/checkpoints").load(state).step  # `with` waited until the save was published
        100

    A program that ends without `close` finishes the save in flight first, or says on stderr that it is lost, however it
    ends: by its last line, an exception, `sys.exit` or Ctrl-C. (SIGKILL, `os._exit` and signals without a handler leave
    no time for that.) An exception at any point of a call, such as Ctrl-C, leaves the Checkpointer usable, or, among
    several ranks that would no longer agree on where they are, refusing every call but `close`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: KeepBest | None = None,
        asynchronous: bool = False,
        on_save_error: Literal["raise", "warn"] = "raise",
        on_save_end: Callable[[SaveEnd], None] | None = None,
        save_timeout: float | None = None,
        exporters: Sequence[Exporter] = (),
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 1800.0,
    ) -> None:
        """Prepare to save to and load from a directory; create a gloo group if there are several ranks.

        Args:
            directory: The directory of checkpoints: a path, or an fsspec URL such as `s3://bucket/run`. It is created
                by the first save.
            keep_last: How many of the newest checkpoints to keep; None keeps all, unless `keep_best` is given.
            keep_every: Keep each checkpoint whose step is a multiple of this, permanently.
            keep_best: Keep the best checkpoints by a metric given to `save`.
            asynchronous: Whether `save` returns as soon as the state is copied to host memory (pinned for tensors on a
                GPU), and a thread writes it. Each rank holds one copy of what it writes from the first save to `close`.
            on_save_error: "raise", or "warn" to continue training if a save could not be written.
            on_save_end: Called on every rank when a save has ended, in the thread that wrote it.
            save_timeout: Seconds that a save may take. Beyond that it fails at its next write; if the storage does not
                return from a write at all, the call that waits for it raises, and the save stays in flight. None for no
                limit.
            exporters: Called with each published checkpoint. The next save and the other ranks wait for them, so they
                must finish within `timeout`.
            process_group: The group to communicate over if only some ranks save together: one created by
                `dist.new_group(ranks, backend="gloo")` and used for nothing else. `close` leaves it open.
            timeout: Seconds that a rank waits for the others.

        Raises:
            CheckpointError: If a setting is invalid.
        """
        retention = Retention(keep_last, keep_every, keep_best)
        if not isinstance(asynchronous, bool):
            raise CheckpointError(f"asynchronous must be True or False, not {asynchronous!r}")
        if on_save_error not in ("raise", "warn"):
            raise CheckpointError(f'on_save_error must be "raise" or "warn", not {on_save_error!r}')
        if save_timeout is not None and not save_timeout > 0:
            raise CheckpointError(f"save_timeout must be a positive number of seconds or None, not {save_timeout!r}")
        self._storage = open_storage(str(directory))
        self._asynchronous = asynchronous
        self._ranks = Ranks(process_group, timeout)
        settings = SaveSettings(retention, tuple(exporters), on_save_error == "warn", on_save_end, save_timeout)
        self._saver = Saver(self._ranks, self._storage, settings)
        self._lock: DirectoryLock | None = None
        self._lock_acquired = False
        # At exit the flight is finished before the finalizers of other objects, such as the lock, run: the first use of
        # `weakref.finalize` anywhere must come before.
        weakref.finalize(self, lambda: None).detach()
        self._flight = Flight()
        self._end = weakref.finalize(self, self._flight.drop)
        self._end.atexit = False
        self._process = os.getpid()
        self._state: Literal["open", "closing", "closed"] = "open"

    @property
    def directory(self) -> str:
        """The directory of checkpoints, as a path or URL."""
        return self._storage.url

    @property
    def in_flight(self) -> int | None:
        """The step of the save that is being written; None if there is none."""
        save = self._flight.current
        return None if save is None or save.ended else save.step

    def acquire_lock(self) -> None:
        """Acquire the directory's lock now. Otherwise the first `save` acquires it. A second call does nothing.

        Call it at the start of a job to find out at once, not at the first save, that another job writes there.

        Raises:
            CheckpointError: On all ranks, if another live job holds the lock.
        """
        self._check_open()
        if self._lock_acquired:
            return

        def acquire() -> None:
            if self._lock is None:
                self._lock = DirectoryLock(self._storage)
            finish_moves(self._storage)

        with self._ranks.conversation("lock the directory"):
            self._ranks.run_on_rank_0(f"lock {self._storage.url}", acquire)
            self._lock_acquired = True

    def save(
        self,
        step: int,
        state: Mapping[str, Stateful],
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save a state as the checkpoint of a step.

        A step that this run loaded or saved last is not written again if it is valid; a warning is logged. After a
        load, the first save sets aside all later checkpoints: the run goes on from the loaded one, and the next load
        takes its line. An asynchronous save first waits for the one in flight; its own failure is raised by the next
        call.

        Args:
            step: The step.
            state: What to save, by name.
            metadata: JSON values to keep with it; returned by `load` and `list_checkpoints`. The entries tokens_seen,
                config_digest, data_fingerprint and layout are also copied to the manifest's lineage.
            metrics: Numbers by which to compare checkpoints, for `keep_best`.

        Raises:
            CheckpointError: On all ranks, if this save or the one in flight failed; existing checkpoints are untouched.
                Also if the directory holds checkpoints and none of them was loaded, or if the step comes before the
                last one. With `on_save_error="warn"` only if the state cannot be saved at all, another job holds the
                lock, or the directory holds another run.
        """
        self.wait()
        self.acquire_lock()
        flight = self._flight if self._asynchronous else None
        self._ranks.begin(f"save step {step}")
        try:
            save = self._saver.prepare(self._lock, flight, step, state, metadata or {}, metrics or {})
            if flight is None:
                save.run()
                return
            flight.current = save  # from here on it is run, by its thread or by the first who waits for it
        except BaseException as error:
            self._ranks.end(error)
            raise
        save.start()

    def wait(self) -> None:
        """Wait until the save in flight is published. An interrupted wait leaves it in flight.

        Raises:
            CheckpointError: On all ranks, if that save failed (each failure is raised once), or if it exceeds
                `save_timeout`.
        """
        self._check_open()
        if self._flight.current is not None:
            self._flight.current.finish()

    def load(
        self,
        state: Mapping[str, Stateful],
        step: int | None = None,
        *,
        required: bool = False,
        on_corruption: OnCorruption = "previous",
        only: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
        strict: bool = True,
        cast: bool = False,
    ) -> Loaded | None:
        """Load a checkpoint into `state`.

        Every byte is verified before it is used. The tensors of each `state_dict()` are filled in place, however they
        are sharded; then `load_state_dict` is called with them and the other values.

        Args:
            state: The objects to fill, by the names they were saved under; names left out are not loaded.
            step: The step to load; None for the newest valid checkpoint. If there are later ones, they are set aside
                by the next `save`, so that the run goes on from this step; without a save nothing changes. To read a
                checkpoint without going back to it, use `open_checkpoint` or another Checkpointer.
            required: Whether it is an error if the directory holds no checkpoint at all.
            on_corruption: What to do if no step was asked for and the newest checkpoint is corrupt: "previous" loads
                the one before it and logs a warning, "raise" raises.
            only: Shell patterns of the names to load, e.g. `["model/layers.*"]`; other names keep their values.
            frozen: Shell patterns of names that keep their values.
            strict: Whether it is an error if the checkpoint lacks a selected name, or holds one within the entries of
                `state` that the state lacks. If False, what matches is loaded, and the result lists the rest.
            cast: Whether tensors may have another dtype than in the checkpoint; they are cast as torch does.

        Returns:
            What was loaded; None if none is required and the directory holds no checkpoint at all.

        Raises:
            CheckpointError: On all ranks: if the step asked for is absent or corrupt; if there are checkpoints but none
                is valid; if the checkpoint does not match `state`, which is unchanged then. If corruption is detected
                while tensors are filled and no other checkpoint can be loaded, the state is partially overwritten (with
                verified data only), and the message says so.
        """
        self.wait()
        request = Request(step, required, on_corruption, Selection(only, frozen), strict, cast)
        with self._ranks.conversation("load"):
            loaded = load(self._ranks, self._storage, state, request)
            if loaded is not None:
                self._saver.continue_from(loaded.manifest)
        return loaded

    def close(self) -> None:
        """Wait for the save in flight, then release the lock, the memory and the process group.

        A second call does nothing. An interrupted one can be repeated.

        Raises:
            CheckpointError: If that save failed.
        """
        if self._state == "closed":
            return
        try:
            if self._state == "open":
                self.wait()
        finally:
            if self.in_flight is None:
                self._release()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _release(self) -> None:
        self._state = "closing"
        if self._lock is not None:
            self._lock.release()
        self._ranks.close()
        self._end.detach()
        self._flight.close()
        self._state = "closed"

    def _check_open(self) -> None:
        if self._state != "open":
            raise CheckpointError(f"the Checkpointer of {self.directory} is closed")
        if os.getpid() != self._process:
            raise CheckpointError(
                f"the Checkpointer of {self.directory} belongs to process {self._process}, of which this one is a "
                "fork: create another one here, for another directory"
            )
