"""The Checkpointer: what a training loop calls to save at intervals and to load at the start.

It combines the other modules: `save.snapshot` collects the state, `save.host_buffer` copies it for asynchronous saves,
`save.writer` writes and publishes, `load.loading` loads, `manage.retention` removes old checkpoints.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import torch.distributed as dist

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.safetensors_header import bytes_of
from titan_ckpt.load.loading import Loaded, OnCorruption, Request, load
from titan_ckpt.load.selection import Selection
from titan_ckpt.manage.retention import KeepBest, Retention
from titan_ckpt.save.file_writer import WrittenFile, write_file
from titan_ckpt.save.host_buffer import HostBuffer
from titan_ckpt.save.snapshot import Planner, Snapshot
from titan_ckpt.save.writer import Origin, WriteJob, prune_old, write_checkpoint
from titan_ckpt.state.tree import Stateful
from titan_ckpt.storage.lock import DirectoryLock
from titan_ckpt.storage.open import open_storage

logger = logging.getLogger(__name__)

# Writes one of this rank's files: its index in the plan, its path, its header.
WriteFile = Callable[[int, str, bytes], WrittenFile]


class Exporter(Protocol):
    """Called with each published checkpoint, e.g. to write its weights in another format."""

    def __call__(self, path: str, /) -> Any:
        """Process the checkpoint at a path or URL; called on rank 0 only, never for two checkpoints at once."""
        ...


class Checkpointer:
    """Save a training state to a directory and load it back.

    If torch.distributed is initialized, all ranks must create one and call its methods together, with the same
    arguments (except for the tensors of their state), and see the same directory. Otherwise it works for the one
    process.

    Example:
        >>> ckpt = Checkpointer("runs/x/checkpoints", keep_last=3, asynchronous=True)
        >>> found = ckpt.load(state)  # None: the directory holds no checkpoint yet
        >>> ckpt.save(100, state, metadata={"tokens_seen": 4096})
        >>> ckpt.close()  # waits until the save is published
        >>> Checkpointer("runs/x/checkpoints").load(state).step
        100
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
            exporters: Called with each published checkpoint. The next save and the other ranks wait for them, so they
                must finish within `timeout`.
            process_group: The group to communicate over if only some ranks save together: one created by
                `dist.new_group(ranks, backend="gloo")` and used for nothing else. `close` leaves it open.
            timeout: Seconds that a rank waits for the others.

        Raises:
            CheckpointError: If a setting is invalid.
        """
        self._retention = Retention(keep_last, keep_every, keep_best)
        if not isinstance(asynchronous, bool):
            raise CheckpointError(f"asynchronous must be True or False, not {asynchronous!r}")
        if on_save_error not in ("raise", "warn"):
            raise CheckpointError(f'on_save_error must be "raise" or "warn", not {on_save_error!r}')
        self._storage = open_storage(str(directory))
        self._on_save_error, self._exporters = on_save_error, tuple(exporters)
        self._ranks = Ranks(process_group, timeout)
        self._planner = Planner(self._ranks)
        self._lock: DirectoryLock | None = None
        self._lock_acquired = False
        self._parent: Mapping[str, Any] | None = None
        # One thread, joined when the interpreter exits, so that a program that just ends loses no save.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="titan-ckpt") if asynchronous else None
        self._buffer = HostBuffer()
        self._in_flight: Future[None] | None = None
        self._closed = False

    @property
    def directory(self) -> str:
        """The directory of checkpoints, as a path or URL."""
        return self._storage.url

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
            self._lock = DirectoryLock(self._storage)

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

        A step that exists already and is valid is not written again; a warning is logged. An asynchronous save first
        waits for the one in flight; its own failure is raised by the next call.

        Args:
            step: The step.
            state: What to save, by name.
            metadata: JSON values to keep with it; returned by `load` and `list_checkpoints`. The entries tokens_seen,
                config_digest, data_fingerprint and layout are also copied to the manifest's lineage.
            metrics: Numbers by which to compare checkpoints, for `keep_best`.

        Raises:
            CheckpointError: On all ranks, if this save or the one in flight failed; existing checkpoints are untouched.
                With `on_save_error="warn"` only if the state cannot be saved at all, or another job holds the lock.
        """
        self.wait()
        self.acquire_lock()
        snapshot = self._planner.take(step, state, metadata or {}, metrics or {})
        if self._thread is None:
            self._write_or_warn(step, snapshot, self._writer_from_state(snapshot))
            return
        extents = self._ranks.run_on_all(
            "copy the state to host memory", lambda: self._buffer.copy(snapshot.own, snapshot.tensors)
        )
        snapshot.tensors.clear()  # training may change the live tensors from here on
        write_file = self._writer_from_buffer(snapshot, extents)
        self._in_flight = self._thread.submit(self._write_or_warn, step, snapshot, write_file)

    def wait(self) -> None:
        """Wait until the save in flight is published.

        Raises:
            CheckpointError: On all ranks, if that save failed; each failure is raised once.
        """
        self._check_open()
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

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
            step: The step to load; None for the newest valid checkpoint.
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
        loaded = load(self._ranks, self._storage, state, request)
        if loaded is not None:
            self._parent = {"step": loaded.step, "digest": loaded.manifest.digest}
        return loaded

    def close(self) -> None:
        """Wait for the save in flight, then release the lock, the memory, the thread and the process group.

        A second call does nothing.

        Raises:
            CheckpointError: If that save failed.
        """
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._closed = True
            if self._thread is not None:
                self._thread.shutdown()
            self._buffer.close()
            if self._lock is not None:
                self._lock.release()
            self._ranks.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CheckpointError(f"the Checkpointer of {self.directory} is closed")

    def _writer_from_state(self, snapshot: Snapshot) -> WriteFile:
        """Return the function that writes a file directly from the live tensors."""

        def write(place: int, path: str, header: bytes) -> WrittenFile:
            runs = ((bytes_of(snapshot.tensors[part]), [part.nbytes]) for part in snapshot.own[place].parts)
            return write_file(self._storage, path, header, runs)

        return write

    def _writer_from_buffer(self, snapshot: Snapshot, extents: Sequence[tuple[int, int]]) -> WriteFile:
        """Return the function that writes a file from the host buffer, where each file's data is contiguous."""

        def write(place: int, path: str, header: bytes) -> WrittenFile:
            lengths = [part.nbytes for part in snapshot.own[place].parts]
            return write_file(self._storage, path, header, [(self._buffer.bytes_at(*extents[place]), lengths)])

        return write

    def _write_or_warn(self, step: int, snapshot: Snapshot, write_file: WriteFile) -> None:
        try:
            self._write(step, snapshot, write_file)
        except CheckpointError as error:
            if self._on_save_error == "raise":
                raise
            logger.warning("%s; training continues", error)

    def _write(self, step: int, snapshot: Snapshot, write_file: WriteFile) -> None:
        origin = Origin(step, snapshot.metadata, snapshot.metrics, self._parent)
        job = WriteJob(origin, snapshot.values, snapshot.own, snapshot.all_files, write_file)
        try:
            digest = write_checkpoint(self._ranks, self._storage, self._lock, job)
        except Exception as error:
            raise CheckpointError(f"step {step} was not saved: {error}") from error
        if digest is None:
            return
        self._parent = {"step": step, "digest": digest}
        self._ranks.run_on_rank_0(f"finish after saving step {step}", lambda: self._follow_up(step))

    def _follow_up(self, step: int) -> None:
        """Run the exporters and the retention policy; on rank 0, once a step is published."""
        assert self._lock is not None
        path = f"{self._storage.url.rstrip('/')}/step-{step:08d}"
        try:
            for export in self._exporters:
                export(path)
        finally:
            prune_old(self._storage, self._lock, self._retention, step)
