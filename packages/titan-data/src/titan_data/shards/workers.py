"""Worker processes that tokenize: `prepare` sends batches of texts and receives their ids in the same order."""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from titan_data.batching.documents import encode_document
from titan_data.errors import DataError, is_failure
from titan_data.tokenizers.base import Tokenizer

_AHEAD = 4  # batches per worker, including results that wait for their turn: keeps workers busy if sizes differ
_CHARACTERS_AHEAD = 1 << 26  # in all batches together: keeps huge documents from piling up in memory


@dataclass(frozen=True)
class Encoded:
    """A batch of tokenized documents.

    Attributes:
        tokens: `[T]`, the ids of all documents, concatenated.
        lengths: int64 `[D]`, tokens of each document.
    """

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], first: int, dtype: np.dtype[Any]) -> Encoded:
    """Tokenize documents, with bos and eos.

    Args:
        tokenizer: Turns texts into ids.
        texts: The documents.
        first: Number of the first document, for messages.
        dtype: Type of the tokens.

    Returns:
        The tokenized documents.

    Raises:
        DataError: If the tokenizer failed on a document; the message has its number.
    """
    documents = []
    for number, text in enumerate(texts, start=first):
        try:
            # One by one, so that this process uses one core.
            documents.append(encode_document(tokenizer, text))
        except BaseException as error:  # a panic of a library in Rust is not an Exception
            if not is_failure(error):
                raise
            raise DataError(f"document {number} cannot be tokenized: {error!r}") from error
    lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    return Encoded(np.concatenate(documents).astype(dtype), lengths)


class _Worker:
    """A worker process, as seen by the main process.

    Attributes:
        process: The process.
        connection: The pipe to it.
        given: Numbers of the batches that it has and whose results have not been received, in order.
    """

    def __init__(self, process: Any, connection: Connection) -> None:
        self.process, self.connection = process, connection
        self.given: deque[int] = deque()


class Encoders:
    """Worker processes, each with its own queue of batches; without workers, this process tokenizes.

    A batch goes to the worker with the fewest batches, so that a slow one does not delay the others; `take` returns
    results in the order of `put` whichever worker is first.

    Args:
        tokenizer: Turns texts into ids; must be picklable if there are workers.
        dtype: Type of the tokens.
        workers: Number of processes.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype[Any], workers: int) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self._results: dict[
            int, Encoded | str
        ] = {}  # results or errors by number of the batch; they arrive in any order
        self._put = self._taken = 0
        self._sizes: deque[int] = deque()  # characters of each batch that has not been taken
        self._workers = _start_workers(tokenizer, dtype, workers) if workers else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            worker.connection.close()  # a worker exits when its pipe is closed
            worker.process.join()

    @property
    def full(self) -> bool:
        """Whether results have to be taken before more texts can be put."""
        return len(self._sizes) >= max(1, _AHEAD * len(self._workers)) or sum(self._sizes) >= _CHARACTERS_AHEAD

    def put(self, texts: Sequence[str], first: int) -> None:
        """Send a batch of texts; `first` is the number of its first document."""
        if self._workers:
            worker = min(self._workers, key=lambda worker: len(worker.given))
            try:
                worker.connection.send((texts, first))
            except OSError:
                raise _died(worker.process) from None
            worker.given.append(self._put)
        else:
            self._results[self._put] = encode_texts(self._tokenizer, texts, first, self._dtype)
        self._put += 1
        self._sizes.append(sum(map(len, texts)))

    def take(self) -> Encoded:
        """Wait for the result of the oldest batch that has not been taken, and return it."""
        while self._taken not in self._results:
            # Receive from every worker that is ready: a pipe holds few results, and its worker would wait.
            busy = [worker for worker in self._workers if worker.given]
            ready = wait([worker.connection for worker in busy])
            for worker in busy:
                if worker.connection in ready:
                    self._receive(worker)
        result = self._results.pop(self._taken)
        self._taken += 1
        self._sizes.popleft()
        if isinstance(result, str):
            raise DataError(result)
        return result

    def _receive(self, worker: _Worker) -> None:
        try:
            self._results[worker.given.popleft()] = worker.connection.recv()
        except (EOFError, OSError):
            raise _died(worker.process) from None


def _start_workers(tokenizer: Tokenizer, dtype: np.dtype[Any], count: int) -> list[_Worker]:
    # Not "fork": this process may have threads that hold locks. Not "forkserver": if someone else has started the
    # server, its processes inherit that one's signal mask instead of the one below.
    context = multiprocessing.get_context("spawn")
    workers = []
    with _sigint_blocked():
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, tokenizer, dtype), daemon=True)
            process.start()
            there.close()
            workers.append(_Worker(process, here))
    return workers


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block Ctrl-C in the processes that are started here: they inherit it, and would show tracebacks while importing.

    In this process it is delivered afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Started now: it unblocks SIGINT when it starts, which would be after the next line.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, tokenizer: Tokenizer, dtype: np.dtype[Any]) -> None:
    """Run a worker until the other end of its pipe is closed, which the death of the main process does too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main process ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    batches: queue.Queue[tuple[Sequence[str], int]] = queue.Queue()

    def receive() -> None:
        # In a thread: if both processes were blocked in sending, they would wait for each other forever.
        try:
            while True:
                batches.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    while True:
        texts, first = batches.get()
        try:
            connection.send(encode_texts(tokenizer, texts, first, dtype))
        except DataError as error:
            connection.send(str(error))
        except OSError:
            os._exit(0)


def _died(process: Any) -> DataError:
    process.join(timeout=60)  # its end of the pipe is closed, so it is about to exit
    return DataError(
        f"a worker process has died (exit code {process.exitcode}), often for lack of memory: "
        "run the same command again, with fewer workers if it was memory"
    )
