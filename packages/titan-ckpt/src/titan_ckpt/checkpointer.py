"""The Checkpointer: save now and then, load at the start."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import torch.distributed as dist

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.safetensors_header import bytes_of
from titan_ckpt.load.loading import Loaded, OnDamage, Request, load
from titan_ckpt.load.selection import Selection
from titan_ckpt.manage.retention import KeepBest, Retention
from titan_ckpt.save.file_writer import WrittenFile, write_file
from titan_ckpt.save.host_buffer import HostBuffer
from titan_ckpt.save.snapshot import Planner, Snapshot
from titan_ckpt.save.writer import Order, Origin, tidy, write_checkpoint
from titan_ckpt.save.writer_process import WriterProcess
from titan_ckpt.state.tree import Stateful
from titan_ckpt.storage.lock import FolderLock
from titan_ckpt.storage.open import open_storage

logger = logging.getLogger(__name__)


class Exporter(Protocol):
    """What is done with each checkpoint once it is published, e.g. to write its weights in another format."""

    def __call__(self, path: str, /) -> Any:
        """Take the checkpoint's path or URL; called on rank 0 alone, never for two checkpoints at once."""
        ...


class Checkpointer:
    """Saves a training state to a folder and loads it back.

    With torch.distributed initialised, all ranks must make one and call its methods together, with the same arguments
    (their state's tensors apart), and see the same folder. Without it, it works for the one process.

    Example:
        >>> ckpt = Checkpointer("runs/x/checkpoints", keep_last=3, asynchronous=True)
        >>> found = ckpt.load(state)
        >>> ckpt.save(step=100, state=state, metadata={"config_digest": "1f2e"})
        >>> ckpt.close()
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: KeepBest | None = None,
        asynchronous: bool | Literal["thread", "process"] = False,
        on_save_error: Literal["raise", "warn"] = "raise",
        also: Sequence[Exporter] = (),
        process_group: dist.ProcessGroup | None = None,
        timeout: float = 1800.0,
    ) -> None:
        """Prepare to save to and load from a folder; makes a gloo group where there are several ranks.

        Args:
            folder: where the checkpoints are: a path, or a URL that fsspec knows, e.g. `s3://bucket/run`; made at the
                first save.
            keep_last: keep the newest so many checkpoints; None for all, unless `keep_best` is given.
            keep_every: keep those whose step is a multiple of this for good.
            keep_best: keep the best by a number that is given at save.
            asynchronous: whether `save` returns as soon as the state is copied to host memory. True or "thread" writes
                in a thread, with pinned memory for a GPU's tensors; "process" in a process of its own, which training's
                Python code does not hold up. Each rank holds one copy of what it writes from the first save to `close`.
            on_save_error: "raise", or "warn" to go on training when a save could not be written.
            also: what to do with each checkpoint once it is published; the next save waits for it, and the other ranks
                do, so it must be done within `timeout`.
            process_group: a group to talk over instead, when only some ranks save together: one made by
                `dist.new_group(ranks, backend="gloo")` and used for nothing else. It is left open by `close`.
            timeout: how long a rank waits for the others, in seconds.

        Raises:
            CheckpointError: when a setting makes no sense.
        """
        self._retention = Retention(keep_last, keep_every, keep_best)
        if asynchronous not in (False, True, "thread", "process"):
            raise CheckpointError(f'asynchronous must be False, True, "thread" or "process", not {asynchronous!r}')
        if on_save_error not in ("raise", "warn"):
            raise CheckpointError(f'on_save_error must be "raise" or "warn", not {on_save_error!r}')
        self._storage = open_storage(str(folder))
        self._on_save_error, self._also = on_save_error, tuple(also)
        self._ranks = Ranks(process_group, timeout)
        self._planner = Planner(self._ranks)
        self._lock: FolderLock | None = None
        self._claimed = False
        self._parent: Mapping[str, Any] | None = None
        # One thread, joined when the interpreter ends, so that a program that just ends loses no save.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="titan-ckpt") if asynchronous else None
        self._buffer = HostBuffer(shared=asynchronous == "process") if asynchronous else None
        self._process: WriterProcess | None = None
        if self._buffer is not None and self._buffer.handle is not None:
            self._process = WriterProcess(self._storage.url, self._buffer.handle)
        self._in_flight: Future[None] | None = None
        self._closed = False

    @property
    def folder(self) -> str:
        """Where the checkpoints are, as a path or URL."""
        return self._storage.url

    def claim(self) -> None:
        """Take the right to write to the folder, which the first `save` does else; a second call does nothing.

        Called at the start of a job, it tells at once that another job writes there, rather than at the first save.

        Raises:
            CheckpointError: on all ranks, when another live job holds it.
        """
        self._refuse_closed()
        if self._claimed:
            return

        def take() -> None:
            self._lock = FolderLock(self._storage)

        self._ranks.on_first(f"claim {self._storage.url}", take)
        self._claimed = True

    def save(
        self,
        step: int,
        state: Mapping[str, Stateful],
        metadata: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Save a state as the checkpoint of a step.

        A step that is there already and sound is not written again; a warning in the log says so. When asynchronous,
        a save still in flight is waited for first, and this one's failure is raised by the next call.

        Args:
            step: the step.
            state: what to save, by name.
            metadata: what else to keep with it, in JSON values; given back by `load` and `list_checkpoints`. The
                entries tokens_seen, config_digest, data_fingerprint and layout also go into the manifest's lineage.
            metrics: numbers by which to compare checkpoints, for `keep_best`.

        Raises:
            CheckpointError: on all ranks, when this save or the one in flight failed; former checkpoints are untouched.
                With `on_save_error="warn"` only for what cannot be saved at all, or when another job holds the folder.
        """
        self.wait()
        self.claim()
        snapshot = self._planner.take(step, state, metadata or {}, metrics or {})
        if self._thread is None or self._buffer is None:
            self._write_or_warn(step, snapshot, self._write_from_state)
            return
        buffer = self._buffer
        extents = self._ranks.together(
            "copy the state to host memory", lambda: buffer.copy(snapshot.own, snapshot.tensors)
        )
        snapshot.tensors.clear()  # the live tensors are training's again

        def write_from_buffer(snapshot: Snapshot, place: int, path: str, header: bytes) -> WrittenFile:
            return self._write_from_buffer(snapshot, extents[place], place, path, header)

        self._in_flight = self._thread.submit(self._write_or_warn, step, snapshot, write_from_buffer)

    def wait(self) -> None:
        """Wait until what was saved is published.

        Raises:
            CheckpointError: on all ranks, when that save failed; it is told once.
        """
        self._refuse_closed()
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def load(
        self,
        state: Mapping[str, Stateful],
        step: int | None = None,
        *,
        required: bool = False,
        on_damage: OnDamage = "previous",
        only: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
        strict: bool = True,
        cast: bool = False,
    ) -> Loaded | None:
        """Load a checkpoint into `state`.

        No byte is used before it is checked. The tensors of each `state_dict()` are filled in place, whatever their
        sharding; then `load_state_dict` gets them together with the rest.

        Args:
            state: what to fill, by the names it was saved under; names left out are not loaded.
            step: the step to load, and no other; None for the newest sound one.
            required: whether it is an error when the folder holds no checkpoint at all.
            on_damage: what to do when no step was asked for and the newest is damaged: take the one before, with a
                warning in the log, or raise.
            only: shell patterns of the names to load, e.g. `["model/layers.*"]`; what matches none keeps its value.
            frozen: shell patterns of the names that keep their values.
            strict: whether it is an error when the checkpoint lacks a name that is asked for, or has one within the
                entries of `state` that is not. If not, what fits is loaded, and the result lists the rest.
            cast: whether tensors may be of another dtype than in the checkpoint; they are cast as torch would.

        Returns:
            What was loaded; None when nothing is required and the folder holds no checkpoint at all.

        Raises:
            CheckpointError: on all ranks: when the step asked for is absent or damaged; when there are checkpoints but
                none is sound; when it does not fit `state`, which is unchanged then. When damage is met amid the
                tensors, those filled before it stay filled, with what is sound; the message says so.
        """
        self.wait()
        request = Request(step, required, on_damage, Selection(only, frozen), strict, cast)
        loaded = load(self._ranks, self._storage, state, request)
        if loaded is not None:
            self._parent = {"step": loaded.step, "digest": loaded.manifest.digest}
        return loaded

    def close(self) -> None:
        """Wait for the save in flight, then give back the folder, the memory, the thread or process and the group.

        A second call does nothing.

        Raises:
            CheckpointError: when that save failed.
        """
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._closed = True
            if self._thread is not None:
                self._thread.shutdown()
            if self._process is not None:
                self._process.close()
            if self._buffer is not None:
                self._buffer.close()
            if self._lock is not None:
                self._lock.release()
            self._ranks.close()

    def _refuse_closed(self) -> None:
        if self._closed:
            raise CheckpointError(f"the Checkpointer of {self.folder} is closed")

    def _write_from_state(self, snapshot: Snapshot, place: int, path: str, header: bytes) -> WrittenFile:
        runs = ((bytes_of(snapshot.tensors[part]), [part.nbytes]) for part in snapshot.own[place].parts)
        return write_file(self._storage, path, header, runs)

    def _write_from_buffer(
        self, snapshot: Snapshot, extent: tuple[int, int], place: int, path: str, header: bytes
    ) -> WrittenFile:
        assert self._buffer is not None
        lengths = [part.nbytes for part in snapshot.own[place].parts]
        if self._process is not None:
            return self._process.write(path, header, extent[0], lengths)
        return write_file(self._storage, path, header, [(self._buffer.bytes_at(*extent), lengths)])

    def _write_or_warn(self, step: int, snapshot: Snapshot, write: Any) -> None:
        try:
            self._write(step, snapshot, write)
        except CheckpointError as error:
            if self._on_save_error == "raise":
                raise
            logger.warning("%s; training goes on", error)

    def _write(self, step: int, snapshot: Snapshot, write: Any) -> None:
        origin = Origin(step, snapshot.metadata, snapshot.metrics, self._parent)
        order = Order(
            origin,
            snapshot.values,
            snapshot.own,
            snapshot.all_files,
            lambda place, path, header: write(snapshot, place, path, header),
        )
        try:
            digest = write_checkpoint(self._ranks, self._storage, self._lock, order)
        except Exception as error:
            raise CheckpointError(f"step {step} was not saved: {error}") from error
        if digest is None:
            return
        self._parent = {"step": step, "digest": digest}
        self._ranks.on_first(f"finish with step {step}, which is saved", lambda: self._follow_up(step))

    def _follow_up(self, step: int) -> None:
        """Run on rank 0 once a step is published."""
        assert self._lock is not None
        path = f"{self._storage.url.rstrip('/')}/step-{step:08d}"
        try:
            for export in self._also:
                export(path)
        finally:
            tidy(self._storage, self._lock, self._retention, step)
