"""The ranks that save and load together: exchange results, and turn one rank's error into an error on all ranks.

Called by the checkpointer, `save` and `load`; nothing else in the package talks to other ranks.

Ranks that are not at the same exchange must never read each other's messages. Two things ensure that. Before each
exchange the ranks compare where they are: its number and what it is about. And exchanges belong to a conversation, such
as one save: if an exception ends it on one rank alone, for instance Ctrl-C between two exchanges, the group is broken.
The other ranks get an error at once, and no rank can use the group any more.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from titan_ckpt.errors import CheckpointError

T = TypeVar("T")
S = TypeVar("S")

_MARK_BYTES = 128  # of what each rank says about an exchange before it: its number and a few words


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
        self._sequence = 0  # of the last exchange
        self._conversation: str | None = None
        self._agreed: BaseException | None = None  # an interrupt of this rank that the others were told of
        self._broken: str | None = None

    def close(self) -> None:
        """Destroy the group; not collective."""
        if self._owned:
            self._destroy()
        self._group = None

    def begin(self, what: str) -> None:
        """Begin a conversation: exchanges that all ranks make in the same order.

        Args:
            what: What it is about, as an infinitive for messages, e.g. "save step 3".

        Raises:
            CheckpointError: If the one before did not end on this rank, so that the ranks may be out of step.
        """
        if self._group is None and self._broken is None:
            return
        if self._conversation is not None:
            self._break(self._conversation, "was interrupted on this rank")
        self._check_usable()
        self._conversation = what

    def end(self, error: BaseException | None = None) -> None:
        """End the conversation.

        Args:
            error: What ended it, if not its success. Unless all ranks know of it, the group is broken.
        """
        agreed = error is None or isinstance(error, CheckpointError) or error is self._agreed
        if not agreed and self._conversation is not None:
            self._break(self._conversation, f"was interrupted on this rank by {type(error).__name__}")
        self._conversation = self._agreed = None

    @contextlib.contextmanager
    def conversation(self, what: str) -> Iterator[None]:
        """Enclose a conversation, see `begin` and `end`."""
        self.begin(what)
        try:
            yield
        except BaseException as error:
            self.end(error)
            raise
        self.end()

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
        exchanged: list[Any] = self.all_gather(what, (shared, outcome.message))
        messages = [message for _, message in exchanged]
        self._raise_interrupt(outcome)
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
        value, message = self._broadcast(what, sent)
        self._raise_interrupt(outcome)
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
        outcome = _attempt(work) if self.rank == 0 else None
        if outcome is not None:
            if isinstance(outcome, _Failure):
                outgoing = [(None, outcome.message)] * self.world_size
            else:
                outgoing = [(item, None) for item in outcome.value]
        received: list[Any] = [None]
        self._exchange(what, lambda: dist.scatter_object_list(received, outgoing, group=self._group, group_src=0))
        item, message = received[0]
        self._raise_interrupt(outcome)
        if message is not None:
            raise CheckpointError(f"could not {what}: {message}") from (outcome.error if outcome else None)
        result: T = item
        return result

    def gather(self, what: str, value: T) -> list[T]:
        """Bring every rank's value to rank 0.

        Args:
            what: What the exchange is about, for messages.
            value: This rank's value, of any type that pickles.

        Returns:
            All values in rank order on rank 0, an empty list elsewhere.
        """
        if self._group is None:
            self._check_usable()
            return [value]
        values: list[Any] = [None] * self.world_size
        received = values if self.rank == 0 else None
        self._exchange(what, lambda: dist.gather_object(value, received, group=self._group, group_dst=0))
        return values if self.rank == 0 else []

    def all_gather(self, what: str, value: T) -> list[T]:
        """Bring every rank's value to all ranks.

        Args:
            what: What the exchange is about, for messages.
            value: This rank's value, of any type that pickles; it should be small.

        Returns:
            All values in rank order.
        """
        if self._group is None:
            self._check_usable()
            return [value]
        values: list[Any] = [None] * self.world_size
        self._exchange(what, lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def _broadcast(self, what: str, value: Any) -> Any:
        values = [value]
        self._exchange(what, lambda: dist.broadcast_object_list(values, group=self._group, group_src=0))
        return values[0]

    def _exchange(self, what: str, exchange: Callable[[], None]) -> None:
        """Make one exchange, once all ranks are at it."""
        self._check_usable()
        if self._group is None:
            return
        self._sequence += 1
        try:
            marks = self._compare_marks(what)
            if marks is None:
                exchange()
        except RuntimeError as error:
            problem = f"a collective failed while saving or loading (did a rank exit?): {error}"
            self._broken = problem
            self._destroy()
            raise CheckpointError(problem) from error
        if marks is not None:
            self._break(f"exchange {self._sequence}", f"found the ranks at different places: {marks}")
            self._check_usable()

    def _compare_marks(self, what: str) -> str | None:
        """Compare where the ranks are; return a description of each rank's place, or None if it is the same."""
        text = f"{self._sequence} {_topic(what)}".encode()[:_MARK_BYTES].ljust(_MARK_BYTES, b"\0")
        own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        gathered = own.new_empty(self.world_size * _MARK_BYTES)
        dist.all_gather_into_tensor(gathered, own, group=self._group)
        marks = gathered.view(self.world_size, _MARK_BYTES)
        differing = (marks != marks[0]).any(1).nonzero().flatten().tolist()
        if not differing:
            return None
        shown = [(rank, bytes(marks[rank].tolist()).rstrip(b"\0")) for rank in [0, *differing[:4]]]
        return "; ".join(f"rank {rank} is at exchange {mark.decode('utf-8', 'replace')!r}" for rank, mark in shown)

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise CheckpointError(
                f"the ranks can no longer save or load together: {self._broken}. Close this Checkpointer and create a "
                "new one on all ranks, or start the job again"
            )

    def _break(self, what: str, how: str) -> None:
        """Let no rank use the group any more; ranks that wait for this one get an error at once."""
        self._broken = f'"{what}" {how}'
        self._conversation = None
        self._destroy()

    def _destroy(self) -> None:
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            with contextlib.suppress(Exception):  # the caller's group may be destroyed already
                dist.destroy_process_group(group)

    def _raise_interrupt(self, outcome: "_Success[Any] | _Failure | None") -> None:
        """Raise what interrupted this rank's work as it is, now that the other ranks know of it."""
        if outcome is not None and outcome.error is not None and not isinstance(outcome.error, Exception):
            self._agreed = outcome.error
            raise outcome.error

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

    error: BaseException

    @property
    def message(self) -> str:
        """The error as text, to send to other ranks."""
        prefix = "" if isinstance(self.error, CheckpointError) else f"{type(self.error).__name__}: "
        return f"{prefix}{self.error}"


def _topic(what: str) -> str:
    """Return the words that are the same on all ranks: paths may differ, and wrong steps have messages of their own."""
    return " ".join(word for word in what.split() if not set(word) & set("/\\:0123456789"))


def _attempt(work: Callable[[], T]) -> _Success[T] | _Failure:
    try:
        return _Success(work())
    except BaseException as error:  # also an interrupt: the other ranks wait for this one's answer
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
