"""The Checkpointer: save now and then, load at the start."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_ckpt.collective import Ranks
from titan_ckpt.errors import CheckpointError
from titan_ckpt.manifest import CheckpointInfo
from titan_ckpt.reader import find_checkpoint, restore
from titan_ckpt.snapshot import Snapshot, take_snapshot
from titan_ckpt.tree import Stateful
from titan_ckpt.writer import write_checkpoint


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
        asynchronous: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Prepare to save to and load from a folder; makes a gloo group where there are several ranks.

        Args:
            folder: where the checkpoints are; made at the first save.
            keep_last: how many checkpoints to keep; None for all.
            asynchronous: whether `save` returns as soon as the state is copied to CPU memory, and writes in a thread.
            process_group: a group to talk over instead, when only some ranks save together: one made by
                `dist.new_group(ranks, backend="gloo")` and used for nothing else. It is left open by `close`.

        Raises:
            CheckpointError: when `keep_last` is less than 1.
        """
        if keep_last is not None and keep_last < 1:
            raise CheckpointError(f"keep_last must be at least 1 or None (keep all), not {keep_last}")
        self.folder = Path(folder).absolute()
        self._keep_last = keep_last
        self._ranks = Ranks(process_group)
        # One thread, joined when the interpreter ends, so that a program that just ends loses no save.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="titan-ckpt") if asynchronous else None
        self._in_flight: Future[None] | None = None
        self._closed = False

    def save(self, step: int, state: Mapping[str, Stateful], metadata: Mapping[str, Any] | None = None) -> None:
        """Save a state as the checkpoint of a step.

        A step that is there already and sound is not written again; a warning in the log says so. When asynchronous,
        a save still in flight is waited for first, and this one's failure is raised by the next call.

        Args:
            step: the step.
            state: what to save, by name.
            metadata: what else to keep with it, in JSON values; given back by `load` and `list_checkpoints`.

        Raises:
            CheckpointError: on all ranks, when this save or the one in flight failed; former checkpoints are untouched.
        """
        self.wait()
        snapshot = take_snapshot(self._ranks, step, state, metadata or {}, copy=self._thread is not None)
        if self._thread is None:
            self._write(snapshot)
        else:
            self._in_flight = self._thread.submit(self._write, snapshot)

    def wait(self) -> None:
        """Wait until what was saved is published.

        Raises:
            CheckpointError: on all ranks, when that save failed; it is told once.
        """
        if self._closed:
            raise CheckpointError(f"the Checkpointer of {self.folder} is closed")
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def load(self, state: Mapping[str, Stateful], step: int | None = None) -> CheckpointInfo | None:
        """Load a checkpoint into `state`.

        Every byte is checked before any is used. The tensors of each `state_dict()` are filled in place, whatever their
        sharding; then `load_state_dict` gets them together with the rest.

        Args:
            state: what to fill, by the names it was saved under; names left out are not loaded.
            step: the step to load; None for the newest sound one. Damaged ones are then passed over with a warning.

        Returns:
            What was loaded; None when no step was asked for and the folder holds no checkpoint at all.

        Raises:
            CheckpointError: on all ranks, when the step asked for is absent or damaged, when there are checkpoints but
                none is sound, or when it does not fit `state`, which is unchanged then.
        """
        self.wait()
        path = find_checkpoint(self._ranks, self.folder, step)
        return None if path is None else restore(self._ranks, path, state)

    def close(self) -> None:
        """Wait for the save in flight, then give back the thread and the group; a second call does nothing.

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
            self._ranks.close()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_checkpoint(self._ranks, self.folder, snapshot, self._keep_last)
        except Exception as error:
            raise CheckpointError(f"step {snapshot.step} was not saved: {error}") from error
