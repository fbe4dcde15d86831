"""One call of `ParallelModel` as all ranks make it: with equal arguments, and ended by the error of any.

Ranks compare a few integers on a host group, which never waits for a device: the exchange is sent before the first
forward and read after it, and errors of a loss function are exchanged at the end. `ParallelModel` makes a `Step` for
each call and passes it to its `Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_parallel._torch_compat import tree_leaves
from titan_parallel.agreement import different
from titan_parallel.errors import LayoutError

LossFunction = Callable[[Any, Any], Tensor]

CALLS = ("forward_backward", "evaluate", "predict")


def host_group() -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks; None if there are no other ranks. All ranks must call this together."""
    if dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return None
    if "gloo" in dist.get_backend_config():
        return dist.group.WORLD
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # this rank is in it
    return group


def checked_loss(loss: Tensor) -> Tensor:
    """Return the result of a loss function.

    Raises:
        ValueError: If it is not a scalar tensor.
    """
    if isinstance(loss, Tensor) and loss.ndim == 0:
        return loss
    found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise ValueError(f"the loss function must return the sum of its losses, a scalar tensor, but returned {found}")


class Step:
    """A call that all ranks make together.

    Args:
        call: One of `CALLS`.
        microbatches: How many this rank got.
        num_target_tokens: What this rank divides by. On a device it is not compared, since reading it would wait.
        random: From `random_digest`.
        group: From `host_group`.

    Attributes:
        has_sent: Whether ranks may be in the middle of a collective, so that an error leaves them out of step.
    """

    def __init__(
        self,
        call: str,
        microbatches: int,
        num_target_tokens: float | Tensor,
        random: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.has_sent = False
        self._call = call
        self._guards = True
        self._random: list[int] = []
        self._trained = 0
        self._sharing: tuple[int, ...] = ()
        self._group = group
        self._problem: Exception | None = None
        if isinstance(num_target_tokens, Tensor) and num_target_tokens.device.type != "cpu":
            num_target_tokens = 0.0
        self._gathering: _Gathering | None = _Gathering(
            [CALLS.index(call), microbatches, float(num_target_tokens), random], group
        )

    def agree(self) -> None:
        """Check that all ranks make the same call, when this rank has work under way; the first time it is called.

        Raises:
            LayoutError: On all ranks, if arguments differ.
        """
        gathering, self._gathering = self._gathering, None
        if gathering is None:
            return
        numbers = gathering.wait()
        calls = [{"the call": CALLS[int(call)]} for call, *_ in numbers]
        arguments = [
            {f"the number of microbatches of {self._call}": int(count), "num_target_tokens": tokens}
            for _, count, tokens, _ in numbers
        ]
        self._random = [int(random) for *_, random in numbers]
        wrong = different(calls, range(len(calls))) or different(arguments, range(len(calls)))
        if wrong:
            self.has_sent = False  # all ranks stop here together
            raise LayoutError(wrong)

    def guard(self, loss_function: LossFunction) -> LossFunction:
        """Return the loss function, but with a zero loss after an exception, which `close` raises.

        So this rank keeps taking part in what the others do, and all end the call together.
        """

        def guarded(output: Any, target: Any) -> Tensor:
            try:
                loss = checked_loss(loss_function(output, target))
                if loss.requires_grad or not torch.is_grad_enabled() or (zero := _zero_of(output)) is None:
                    return loss
                return loss + zero  # of no token, say: the others have a backward
            except Exception as error:
                zero = _zero_of(output) if self._guards else None
                if zero is None:  # then this rank cannot take part in the backward of the others
                    raise
                self._problem = self._problem or error
                return zero

        return guarded

    @contextmanager
    def unguarded(self) -> Iterator[None]:
        """Let loss functions raise, where ranks do not depend on one another."""
        self._guards = False
        try:
            yield
        finally:
            self._guards = True

    def check_random(self, ranks: Sequence[int]) -> None:
        """Check that these ranks began with equal random states; if not, `close` raises.

        Args:
            ranks: Numbers of the ranks that must have drawn the same.
        """
        if self._group is None:
            return
        name = "the state of torch's random generator (for dropout)"
        states = [{name: f"{self._random[rank]:012x}"} for rank in ranks]
        wrong = different(states, ranks)
        self.fail(LayoutError(wrong) if wrong else None)

    def fail(self, problem: Exception | None) -> None:
        """Let `close` raise an exception, if there is one, on all ranks."""
        self._problem = self._problem or problem

    def check_trained(self, has_gradient: Sequence[bool], ranks: Sequence[int]) -> None:
        """Let `close` check that ranks with the same parameters have gradients of the same ones.

        Before torch 2.15 FSDP2 sums what each rank has a gradient of, in order: where ranks use different parameters,
        it adds the gradient of one to that of another.

        Args:
            has_gradient: Whether each parameter of this rank has a gradient.
            ranks: The ranks that share them.
        """
        self._trained, self._sharing = crc32(bytes(has_gradient)), tuple(ranks)

    def close(self) -> None:
        """End the call: raise the exception of a loss function, on the rank that has it and on all others.

        Raises:
            RuntimeError: On ranks whose own loss function did not fail.
            LayoutError: On all ranks, if a check of this step fails on any.
        """
        first = self._sharing[0] if self._sharing else -1
        trained: dict[int, int] = {}
        ended = _Gathering([self._problem is not None, first, self._trained], self._group).wait()
        for _, owner, found in ended:
            if trained.setdefault(int(owner), int(found)) != found and self._problem is None:
                self._problem = LayoutError(
                    "ranks used different parameters in this step, whose gradients this version of torch adds up "
                    "wrongly; install torch 2.15 or later, or use all parameters on every rank, for example with a "
                    "masked input"
                )
        if self._problem is not None or any(failed for failed, *_ in ended):
            self.raise_together(self._problem)

    def raise_together(self, problem: Exception | None) -> None:
        """Raise an exception on all ranks if any rank has one; a rank that has one raises its own."""
        failed = _Gathering([problem is not None], self._group).wait()
        if not any(value for (value,) in failed):
            return
        found: list[tuple[bool, str] | None] = [None] * len(failed)
        if self._group is not None:
            mine: tuple[bool, str] | None = None
            if problem is not None:
                mine = isinstance(problem, LayoutError), f"{type(problem).__name__}: {problem}"
            dist.all_gather_object(found, mine, group=self._group)
        if problem is not None:
            raise problem
        rank, (is_layout, text) = next((rank, one) for rank, one in enumerate(found) if one is not None)
        if is_layout:
            raise LayoutError(text.partition(": ")[2])
        raise RuntimeError(f"{self._call} failed on rank {rank}: {text}")


class _Gathering:
    """Numbers of all ranks, under way."""

    def __init__(self, numbers: Sequence[float], group: dist.ProcessGroup | None) -> None:
        mine = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self._ranks = [torch.empty_like(mine) for _ in range(1 if group is None else group.size())]
        self._work = None
        if group is None:
            self._ranks[0] = mine
        else:
            self._work = dist.all_gather(self._ranks, mine, group=group, async_op=True)

    def wait(self) -> list[list[float]]:
        """Return the numbers of each rank."""
        if self._work is not None:
            self._work.wait()
        return [one.tolist() for one in self._ranks]


def _zero_of(output: Any) -> Tensor | None:
    """Return a zero that depends on all of a model's output, or None if there is nothing that it could depend on."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not torch.is_grad_enabled():
        return torch.zeros((), device=tensors[0].device if tensors else None)
    tensors = [tensor for tensor in tensors if tensor.requires_grad]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return torch.stack([tensor.float().sum() * 0 for tensor in local]).sum() if local else None
