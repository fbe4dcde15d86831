"""What each save of a run consists of: from the state to a `Save` that can be run, and what the run's head is.

Called by the checkpointer on all ranks, once the directory's lock is held. `prepare` looks once at what the directory
holds (`manage.lineage`), collects the state (`snapshot`), copies it for an asynchronous save (`host_buffer`), and
returns the `Save` (`in_flight`) that writes and publishes it (`writer`), runs exporters and removes old checkpoints.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.format.manifest import Manifest, directory_name
from titan_ckpt.format.safetensors_header import bytes_of
from titan_ckpt.manage.lineage import Head, continue_line, head_of, is_published
from titan_ckpt.manage.retention import Retention
from titan_ckpt.messages import get_logger
from titan_ckpt.save.file_writer import WrittenFile, write_file
from titan_ckpt.save.in_flight import Deadline, Flight, Save, SaveEnd
from titan_ckpt.save.snapshot import Planner, Snapshot
from titan_ckpt.save.writer import Origin, WriteJob, prune_old, write_checkpoint
from titan_ckpt.state.tree import Stateful
from titan_ckpt.storage.base import Storage
from titan_ckpt.storage.lock import DirectoryLock

logger = get_logger(__name__)

# Writes one of this rank's files: its index in the plan, its path, its header.
WriteFile = Callable[[int, str, bytes], WrittenFile]


class Exporter(Protocol):
    """Called with each published checkpoint, e.g. to write its weights in another format."""

    def __call__(self, path: str, /) -> Any:
        """Process the checkpoint at a path or URL; called on rank 0 only, never for two checkpoints at once."""
        ...


@dataclass(frozen=True)
class SaveSettings:
    """What holds for all saves of a run; see `Checkpointer`.

    Attributes:
        retention: What to keep.
        exporters: Called with each published checkpoint, on rank 0.
        lenient: Whether a save that fails is only logged.
        on_end: Called on every rank when a save has ended.
        timeout: Seconds that a save may take; None for no limit.
    """

    retention: Retention
    exporters: tuple[Exporter, ...]
    lenient: bool
    on_end: Callable[[SaveEnd], None] | None
    timeout: float | None


class Saver:
    """Prepares the saves of a run, one after the other, and knows which checkpoint the run goes on from."""

    def __init__(self, ranks: Ranks, storage: Storage, settings: SaveSettings) -> None:
        self._ranks, self._storage, self._settings = ranks, storage, settings
        self._planner = Planner(ranks)
        self._head: Head | None = None
        self._publishing: Head | None = None  # what is the head if an interrupted save was published nevertheless
        self._continues_line = False  # whether the directory's newest is the head; the same on all ranks

    def continue_from(self, manifest: Manifest) -> None:
        """Let the run go on from a checkpoint that was loaded."""
        self._head, self._publishing, self._continues_line = head_of(manifest), None, False

    def prepare(
        self,
        lock: DirectoryLock | None,
        flight: Flight | None,
        step: int,
        state: Mapping[str, Stateful],
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> Save:
        """Fix what a save writes; collective. The conversation of the ranks ends with the save.

        Args:
            lock: The directory's lock on rank 0, None elsewhere.
            flight: Where the host buffer is taken from and returned to; None to write from the live tensors.
            step: The step.
            state: What to save, by top-level name.
            metadata: The caller's metadata.
            metrics: The caller's metrics.

        Returns:
            The save. If there is no `flight`, it must be run before the state changes.

        Raises:
            CheckpointError: On all ranks, if it cannot be saved.
        """
        deadline = Deadline(f"the save of step {step}", self._settings.timeout)
        self._continue_line()
        earliest = self._head.step if self._head is not None else 0
        snapshot = self._planner.take(step, state, metadata, metrics, earliest)
        if flight is None:
            return self._save_of_state(lock, step, snapshot, deadline)
        return self._save_of_copy(lock, flight, step, snapshot, deadline)

    def _continue_line(self) -> None:
        """Make this run's head the newest checkpoint of the directory, if it was not yet."""
        if self._continues_line:
            return

        def look() -> Head | None:
            head, publishing = self._head, self._publishing
            if publishing is not None and is_published(self._storage, publishing):
                head = publishing
            return continue_line(self._storage, head)

        self._head = self._ranks.run_on_rank_0("save", look)
        self._publishing, self._continues_line = None, True

    def _save_of_state(self, lock: DirectoryLock | None, step: int, snapshot: Snapshot, deadline: Deadline) -> Save:
        """Return the save that writes directly from the live tensors."""

        def write(place: int, path: str, header: bytes) -> WrittenFile:
            runs = ((bytes_of(snapshot.tensors[part]), [part.nbytes]) for part in snapshot.own[place].parts)
            return write_file(self._storage, path, header, runs, deadline.check)

        return self._save(lock, step, snapshot, write, deadline)

    def _save_of_copy(
        self, lock: DirectoryLock | None, flight: Flight, step: int, snapshot: Snapshot, deadline: Deadline
    ) -> Save:
        """Copy the state; return the save that writes from the copy, in which each file's data is contiguous."""
        buffer = flight.take_buffer()

        try:
            extents = self._ranks.run_on_all(
                "copy the state to host memory", lambda: buffer.copy(snapshot.own, snapshot.tensors)
            )
        except BaseException:
            flight.give_back(buffer)
            raise
        snapshot.tensors.clear()  # training may change the live tensors from here on

        def write(place: int, path: str, header: bytes) -> WrittenFile:
            lengths = [part.nbytes for part in snapshot.own[place].parts]
            runs = [(buffer.bytes_at(*extents[place]), lengths)]
            return write_file(self._storage, path, header, runs, deadline.check)

        return self._save(lock, step, snapshot, write, deadline, lambda: flight.give_back(buffer))

    def _save(
        self,
        lock: DirectoryLock | None,
        step: int,
        snapshot: Snapshot,
        write_file: WriteFile,
        deadline: Deadline,
        give_back: Callable[[], None] = lambda: None,
    ) -> Save:
        def work() -> None:
            try:
                self._write(lock, step, snapshot, write_file)
            except BaseException as error:
                self._ranks.end(error)
                raise
            finally:
                give_back()
            self._ranks.end()

        def report(error: BaseException | None) -> None:
            if isinstance(error, CheckpointError) and self._settings.lenient:
                logger.warning("%s; training continues", error)
            on_end = self._settings.on_end
            if on_end is not None:
                try:
                    on_end(SaveEnd(step, self._path(step), deadline.elapsed, error))
                except Exception as problem:
                    logger.warning("on_save_end failed after step %d: %s: %s", step, type(problem).__name__, problem)

        return Save(step, work, deadline, report, lenient=self._settings.lenient)

    def _path(self, step: int) -> str:
        return f"{self._storage.url.rstrip('/')}/{directory_name(step)}"

    def _write(self, lock: DirectoryLock | None, step: int, snapshot: Snapshot, write_file: WriteFile) -> None:
        def before_publishing(head: Head) -> None:
            self._publishing = head

        origin = Origin(step, snapshot.metadata, snapshot.metrics, self._head)
        job = WriteJob(origin, snapshot.values, snapshot.own, snapshot.all_files, write_file, before_publishing)
        self._continues_line = False  # until it is known whether this one was published
        try:
            head = write_checkpoint(self._ranks, self._storage, lock, job)
        except Exception as error:
            raise CheckpointError(f"step {step} was not saved: {error}") from error
        if head is not None:
            self._head = head
        self._publishing, self._continues_line = None, True
        if head is None:
            return
        self._ranks.run_on_rank_0(f"finish after saving step {step}", lambda: self._follow_up(lock, step))

    def _follow_up(self, lock: DirectoryLock | None, step: int) -> None:
        """Run the exporters and the retention policy; on rank 0, once a step is published."""
        assert lock is not None
        path = self._path(step)
        try:
            for export in self._settings.exporters:
                export(path)
        finally:
            prune_old(self._storage, lock, self._settings.retention)
