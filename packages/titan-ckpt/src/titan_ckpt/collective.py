"""What the ranks of one checkpoint do together: share results, and fail as one."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

import torch.distributed as dist

from titan_ckpt.errors import CheckpointError

T = TypeVar("T")


class Ranks:
    """The ranks that save and load together; without torch.distributed, this process alone.

    They talk over a gloo group that nobody else uses, so that a save running in a thread never mixes its messages
    with those of training. Every method that takes `work` runs it so that an error on one rank becomes a
    CheckpointError on all of them: whoever raised alone would leave the others waiting.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, timeout: float = 1800.0) -> None:
        """Make the gloo group; a collective call when torch.distributed runs with several ranks.

        Args:
            process_group: a group to use instead, one that can send CPU tensors.
            timeout: how long a rank waits for the others, in seconds.
        """
        self._owned = process_group is None
        self._group = _group_of(process_group, timeout)
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self.world = 1 if self._group is None else dist.get_world_size(self._group)

    def close(self) -> None:
        """Give the group back; not collective."""
        if self._owned and self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def together(self, what: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return this rank's own result.

        Args:
            what: what the work does, in the infinitive, for the message ("write the tensors").
            work: what to run; it may raise anything.

        Returns:
            What `work` returned here.

        Raises:
            CheckpointError: on all ranks, when it raised on any.
        """
        mine = _Outcome.of(work)
        self._raise_any(what, self.all_gather(mine.failure), mine.error)
        return mine.value

    def share(self, what: str, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return every rank's result, at the cost of one exchange.

        Args:
            what: what the work does, in the infinitive, for the message.
            work: what to run; it may raise anything, and its result should be small.

        Returns:
            The results in order of rank.

        Raises:
            CheckpointError: on all ranks, when it raised on any.
        """
        mine = _Outcome.of(work)
        told = self.all_gather((mine.result, mine.failure))
        self._raise_any(what, [failure for _, failure in told], mine.error)
        return [cast(T, result) for result, _ in told]

    def on_first(self, what: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone and return its result on every rank.

        Args:
            what: what the work does, in the infinitive, for the message.
            work: what to run on rank 0; it may raise anything.

        Returns:
            What `work` returned on rank 0.

        Raises:
            CheckpointError: on all ranks, when it raised.
        """
        mine = _Outcome.of(work) if self.rank == 0 else None
        value, failure = self._broadcast(None if mine is None else (mine.result, mine.failure))
        if failure is not None:
            raise CheckpointError(f"could not {what}: {failure}") from (mine.error if mine else None)
        return cast(T, value)

    def deal(self, what: str, work: Callable[[], list[T]]) -> T:
        """Run `work` on rank 0 alone and hand each rank its own item of the list it returns.

        Args:
            what: what the work does, in the infinitive, for the message.
            work: makes one item per rank.

        Returns:
            This rank's item.

        Raises:
            CheckpointError: on all ranks, when it raised.
        """
        if self._group is None:
            return self.on_first(what, work)[0]
        hands: list[Any] | None = None
        error: BaseException | None = None
        if self.rank == 0:
            made = _Outcome.of(work)
            error = made.error
            hands = [(item, None) for item in made.value] if error is None else [(None, made.failure)] * self.world
        mine: list[Any] = [None]
        _run(lambda: dist.scatter_object_list(mine, hands, group=self._group, group_src=0))
        item, failure = mine[0]
        if failure is not None:
            raise CheckpointError(f"could not {what}: {failure}") from error
        return cast(T, item)

    def gather(self, value: T) -> list[T]:
        """Bring every rank's value to rank 0.

        Args:
            value: this rank's part, of any type that pickles.

        Returns:
            All values in order of rank on rank 0, an empty list elsewhere.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        _run(lambda: dist.gather_object(value, values if self.rank == 0 else None, group=self._group, group_dst=0))
        return values if self.rank == 0 else []

    def all_gather(self, value: T) -> list[T]:
        """Bring every rank's value to all ranks.

        Args:
            value: this rank's part, of any type that pickles; keep it small.

        Returns:
            All values in order of rank.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world
        _run(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def _broadcast(self, value: Any) -> Any:
        values = [value]
        if self._group is not None:
            _run(lambda: dist.broadcast_object_list(values, group=self._group, group_src=0))
        return values[0]

    def _raise_any(self, what: str, told: list[str | None], error: BaseException | None) -> None:
        failures = {rank: failure for rank, failure in enumerate(told) if failure is not None}
        if failures:
            raise CheckpointError(self._told(what, failures)) from error

    def _told(self, what: str, failures: dict[int, str]) -> str:
        if self.world == 1:
            return f"could not {what}: {failures[0]}"
        shown = [f"rank {rank}: {told}" for rank, told in list(failures.items())[:4]]
        more = f" (and {len(failures) - 4} ranks more)" if len(failures) > 4 else ""
        return f"could not {what}: " + "; ".join(shown) + more


class _Outcome(Generic[T]):
    """A result, or the error that came in its place."""

    def __init__(self, result: T | None, error: BaseException | None) -> None:
        self.result = result
        self.error = error

    @classmethod
    def of(cls, work: Callable[[], T]) -> "_Outcome[T]":
        try:
            return cls(work(), None)
        except Exception as error:
            return cls(None, error)

    @property
    def value(self) -> T:
        return cast(T, self.result)

    @property
    def failure(self) -> str | None:
        if self.error is None:
            return None
        return (
            str(self.error) if isinstance(self.error, CheckpointError) else f"{type(self.error).__name__}: {self.error}"
        )


def _group_of(process_group: dist.ProcessGroup | None, timeout: float) -> dist.ProcessGroup | None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
        return None
    # A new group over some ranks only is for the caller to make: all ranks have to call new_group, and with
    # use_local_synchronization torch (2.15) numbers the groups made later differently on members and others.
    if process_group is not None:
        return process_group
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))


def _run(exchange: Callable[[], None]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise CheckpointError(f"the ranks lost one another while saving or loading; has one died? {error}") from error
