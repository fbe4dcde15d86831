"""The ranks that save and load together: exchange results, and turn one rank's error into an error on all ranks.

Called by the checkpointer, `save` and `load`; nothing else in the package talks to other ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from titan_ckpt.errors import CheckpointError

T = TypeVar("T")
S = TypeVar("S")


class Ranks:
    """The ranks that save and load together; without torch.distributed, this process alone.

    They communicate over a gloo group of their own, so that messages of a save running in a thread never mix with those
    of training. Every method with a `work` argument runs it so that an error on one rank becomes a CheckpointError on
    all ranks: a rank that raised alone would leave the others waiting.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, timeout: float = 1800.0) -> None:
        """Create the gloo group; a collective call if torch.distributed runs with several ranks.

        Args:
            process_group: An existing group to use instead, one that can send CPU tensors.
            timeout: Seconds to wait for the other ranks.
        """
        self._owned = process_group is None
        self._group = _group_of(process_group, timeout)
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self.world_size = 1 if self._group is None else dist.get_world_size(self._group)

    def close(self) -> None:
        """Destroy the group; not collective."""
        if self._owned and self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def run_on_all(self, what: str, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return this rank's own result.

        Args:
            what: What the work does, as an infinitive for the message, e.g. "write the tensors".
            work: The work; it may raise anything.

        Returns:
            The result of `work` on this rank.

        Raises:
            CheckpointError: On all ranks, if it raised on any.
        """
        own, _ = self.run_and_share(what, lambda: (work(), None))
        return own

    def gather_from_all(self, what: str, work: Callable[[], S]) -> list[S]:
        """Run `work` on every rank and return every rank's result on all ranks.

        Args:
            what: What the work does, as an infinitive for the message.
            work: The work; it may raise anything. Its result should be small.

        Returns:
            The results in rank order.

        Raises:
            CheckpointError: On all ranks, if it raised on any.
        """
        _, gathered = self.run_and_share(what, lambda: (None, work()))
        return gathered

    def run_and_share(self, what: str, work: Callable[[], tuple[T, S]]) -> tuple[T, list[S]]:
        """Run `work` on every rank; keep one half of its result here and share the other, with a single exchange.

        Args:
            what: What the work does, as an infinitive for the message.
            work: Returns what stays on this rank and what all ranks get; it may raise anything. The second should be
                small.

        Returns:
            This rank's own part, and the shared parts in rank order.

        Raises:
            CheckpointError: On all ranks, if it raised on any.
        """
        outcome = _attempt(work)
        shared = None if isinstance(outcome, _Failure) else outcome.value[1]
        exchanged: list[Any] = self.all_gather((shared, outcome.message))
        messages = [message for _, message in exchanged]
        if isinstance(outcome, _Failure) or any(message is not None for message in messages):
            raise CheckpointError(f"could not {what}: {self._summary(messages)}") from outcome.error
        return outcome.value[0], [part for part, _ in exchanged]

    def run_on_rank_0(self, what: str, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 only and return its result on every rank.

        Args:
            what: What the work does, as an infinitive for the message.
            work: The work; it may raise anything.

        Returns:
            The result of `work` on rank 0.

        Raises:
            CheckpointError: On all ranks, if it raised.
        """
        outcome = _attempt(work) if self.rank == 0 else None
        sent = None if outcome is None else (None if isinstance(outcome, _Failure) else outcome.value, outcome.message)
        value, message = self._broadcast(sent)
        if message is not None:
            raise CheckpointError(f"could not {what}: {message}") from (outcome.error if outcome else None)
        result: T = value
        return result

    def scatter_from_rank_0(self, what: str, work: Callable[[], list[T]]) -> T:
        """Run `work` on rank 0 only and give each rank its own item of the list it returns.

        Args:
            what: What the work does, as an infinitive for the message.
            work: Returns one item per rank; it may raise anything.

        Returns:
            This rank's item.

        Raises:
            CheckpointError: On all ranks, if it raised.
        """
        if self._group is None:
            return self.run_on_rank_0(what, work)[0]
        outgoing: list[Any] | None = None
        error: Exception | None = None
        if self.rank == 0:
            outcome = _attempt(work)
            error = outcome.error
            if isinstance(outcome, _Failure):
                outgoing = [(None, outcome.message)] * self.world_size
            else:
                outgoing = [(item, None) for item in outcome.value]
        received: list[Any] = [None]
        _exchange(lambda: dist.scatter_object_list(received, outgoing, group=self._group, group_src=0))
        item, message = received[0]
        if message is not None:
            raise CheckpointError(f"could not {what}: {message}") from error
        result: T = item
        return result

    def gather(self, value: T) -> list[T]:
        """Bring every rank's value to rank 0.

        Args:
            value: This rank's value, of any type that pickles.

        Returns:
            All values in rank order on rank 0, an empty list elsewhere.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        _exchange(lambda: dist.gather_object(value, values if self.rank == 0 else None, group=self._group, group_dst=0))
        return values if self.rank == 0 else []

    def all_gather(self, value: T) -> list[T]:
        """Bring every rank's value to all ranks.

        Args:
            value: This rank's value, of any type that pickles; it should be small.

        Returns:
            All values in rank order.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        _exchange(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def _broadcast(self, value: Any) -> Any:
        values = [value]
        if self._group is not None:
            _exchange(lambda: dist.broadcast_object_list(values, group=self._group, group_src=0))
        return values[0]

    def _summary(self, messages: Sequence[str | None]) -> str:
        """Join the ranks' error messages, at most four of them."""
        failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if self.world_size == 1:
            return failed[0][1]
        more = f" (and {len(failed) - 4} more ranks)" if len(failed) > 4 else ""
        return "; ".join(f"rank {rank}: {message}" for rank, message in failed[:4]) + more


@dataclass(frozen=True)
class _Success(Generic[T]):
    """The result of some work."""

    value: T
    error: None = None
    message: None = None


@dataclass(frozen=True)
class _Failure:
    """The error that some work raised."""

    error: Exception

    @property
    def message(self) -> str:
        """The error as text, to send to other ranks."""
        prefix = "" if isinstance(self.error, CheckpointError) else f"{type(self.error).__name__}: "
        return f"{prefix}{self.error}"


def _attempt(work: Callable[[], T]) -> _Success[T] | _Failure:
    try:
        return _Success(work())
    except Exception as error:
        return _Failure(error)


def _group_of(process_group: dist.ProcessGroup | None, timeout: float) -> dist.ProcessGroup | None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
        return None
    # A group over some of the ranks must be created by the caller: all ranks have to call new_group. torch 2.15:
    # with use_local_synchronization, groups created later get different names on members and on other ranks.
    if process_group is not None:
        return process_group
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    assert isinstance(group, dist.ProcessGroup)  # as every rank is a member
    return group


def _exchange(exchange: Callable[[], None]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise CheckpointError(f"a collective failed while saving or loading (did a rank exit?): {error}") from error
