"""The loader: global batch n is a function of (sources, tokenizer, settings, seed, n), and of nothing else."""

import logging
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from titan_data.batching.batch import Batch
from titan_data.batching.best_fit import BestFit
from titan_data.batching.checks import check_sizes, check_tokenizers
from titan_data.batching.documents import Encode, encode_documents
from titan_data.batching.feeds import Feed, open_feed
from titan_data.batching.global_batches import Position, Reader
from titan_data.batching.mixing import Stage, Weighted, plan_phases
from titan_data.batching.packing import Concat, OnePerRow, Packer, Packing
from titan_data.batching.prefetch import Prefetcher
from titan_data.batching.shared_tokens import TokenShare
from titan_data.batching.state import Settings, dump_state, read_state
from titan_data.errors import DataError
from titan_data.sources.base import Source, TokenSource
from titan_data.tokenizers.base import Tokenizer

_EXIT_SECONDS = 5.0  # a read that hangs (a network, say) is not waited for longer when the process ends …
_CLOSE_SECONDS = 60.0  # … or when the loader is told to stop; making a large batch may take a while

_log = logging.getLogger(__name__)


class Loader:
    """An iterator over this rank's rows of global batch 0, 1, 2, …, resumable on any number of ranks.

    A source's documents, in an order of their own for each epoch, are one long sequence; rows are cut from it as
    `packing` says. Each row of a global batch comes from one source, and sources keep their places independently. Each
    document is used once per epoch, and the next epoch follows without end, unless `max_epochs` ends it.

    Args:
        sources: where documents come from: one source, or several with their weights, in any order.
        tokenizer: turns texts into ids. With sources of tokens it only checks (fingerprint, vocabulary), and may be
            None.
        seq_len: S, tokens per row.
        global_batch_size: G, rows per step over all ranks; a multiple of `world`.
        seed: decides the order of the documents where they are shuffled.
        shuffle: visit the documents of each epoch in an order of its own. A stream keeps its own order.
        packing: how documents become rows; `Packing()`, which is "concat", if None.
        stages: switches of weights or S at given steps, in their order.
        rank: which share of the rows is this process's: rows `rank * G / world` up to `(rank + 1) * G / world`.
        world: number of ranks among which the rows are divided (of the data axis: ranks that work together on the
            same rows, as in tensor parallelism, count once and all give the same `rank`).
        prefetch: batches read ahead by a thread; 0 to read each when it is asked for.
        workers: threads that tokenize texts ahead; 0 to tokenize where the batch is made. Most tokenizers let other
            threads run meanwhile. Changes nothing in the batches.
        share_folder: a folder on this machine's own disk through which the loaders of its ranks share what they
            tokenize, so that each text is tokenized once and not by each of them. Of one job alone; made and cleared
            by the loaders. Changes nothing in the batches.
        pin_memory: put the tensors into page-locked memory, from where a GPU copies them in the background.
        patience: seconds to wait for a batch that is read ahead before a warning says what is being read and where
            that hangs; the next ones follow after twice as long each. The loader goes on when the storage does.

    Raises:
        DataError: sizes, sources or stages that do not fit together, or a source that cannot be used.
    """

    def __init__(
        self,
        sources: Source | Sequence[Weighted],
        tokenizer: Tokenizer | None,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        packing: Packing | None = None,
        stages: Sequence[Stage] = (),
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        workers: int = 0,
        share_folder: str | Path | None = None,
        pin_memory: bool = False,
        patience: float = 60.0,
    ) -> None:
        check_sizes(global_batch_size, rank, world, prefetch, workers)
        if not patience > 0:
            raise DataError(f"patience must be more than 0 seconds, not {patience}")
        if pin_memory and not torch.accelerator.is_available():
            raise DataError("pin_memory=True needs an accelerator such as a CUDA GPU, and torch sees none")
        parts = _parts(sources)
        packing = packing or Packing()
        phases = plan_phases(parts, seq_len, stages)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="titan-data-tokenize") if workers > 0 else None
        if pool is not None:
            weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)
        check_tokenizers([part.source for part in parts], tokenizer)
        encode = _encoder(tokenizer, share_folder, [part.source for part in parts])
        self._feeds = [
            open_feed(part.source, encode, seed=seed, shuffle=shuffle, pool=pool, workers=workers) for part in parts
        ]
        rows = global_batch_size // world
        self._reader = Reader(
            parts,
            [_open_packer(feed, part.max_epochs, packing) for feed, part in zip(self._feeds, parts, strict=True)],
            phases,
            rows=global_batch_size,
            own=range(rank * rows, (rank + 1) * rows),
            cross_document=packing.cross_document,
            pad_id=_pad_id(tokenizer),
            vocab_size=None if tokenizer is None else tokenizer.vocab_size,
        )
        self._settings = Settings(
            seed=seed,
            shuffle=shuffle,
            tokenizer=None if tokenizer is None else tokenizer.fingerprint,
            global_batch_size=global_batch_size,
            packing=packing,
            phases=phases,
            fingerprints={part.source.name: part.source.fingerprint() for part in parts},
            max_epochs={part.source.name: part.max_epochs for part in parts},
        )
        self._position = self._reader.position  # of what was handed out; the reader may be ahead
        self._depth = prefetch
        self._pin_memory = pin_memory
        self._patience = patience
        self._prefetcher: Prefetcher[tuple[Batch, Position]] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    @property
    def step(self) -> int:
        """Number of global batches handed out so far."""
        return self._position.step

    @property
    def tokens_per_step(self) -> int:
        """G * S of the next global batch, padding included."""
        return self._settings.global_batch_size * self._reader.phase(self.step).seq_len

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._depth == 0:
            batch, self._position = _produce(self._reader, self._pin_memory)()
            return batch
        if self._prefetcher is not None and self._prefetcher.closed:
            self._stop_reading()
        if self._prefetcher is None or self._prefetcher.ended:
            self._prefetcher = Prefetcher(_produce(self._reader, self._pin_memory), self._depth)
            # When the loader is freed or Python goes down: the thread must be gone before numpy and torch are.
            self._finalizer = weakref.finalize(self, self._prefetcher.close, _EXIT_SECONDS)
        try:
            batch, self._position = self._prefetcher.get(self._patience, self._warn)
        finally:
            if self._prefetcher.ended:
                self.close()
        return batch

    def _warn(self, seconds: float) -> None:
        if self._prefetcher is not None:
            _log.warning(
                "no batch for %g s: step %d is being read, at %s", seconds, self.step, self._prefetcher.describe()
            )

    def close(self) -> None:
        """Stop reading ahead. Asking for another batch starts it again; nothing is skipped.

        A read that hangs is waited for up to a minute and then left to itself, with a warning.
        """
        try:
            self._stop_reading()
        except DataError as error:
            _log.warning("%s", error)

    def _stop_reading(self) -> None:
        """End the thread that reads ahead.

        Raises:
            DataError: a read hangs. Nothing can be read, as its source must not be read by two threads.
        """
        if self._prefetcher is None:
            return
        if not self._prefetcher.close(_CLOSE_SECONDS):
            raise DataError(
                f"a read has been hanging for {_CLOSE_SECONDS:g} s, at {self._prefetcher.describe()}: is the storage "
                "still there? Try again when it is, or start the process anew; the loader stands at step "
                f"{self.step} as before"
            )
        if self._finalizer is not None:
            self._finalizer.detach()
        self._prefetcher = self._finalizer = None
        self._reader.seek(self._position)

    def accounting(self) -> dict[str, dict[str, int]]:
        """Count what has been handed out so far, over all ranks.

        Returns:
            For each source by name: "tokens" (without padding), "documents" (completed), "epoch" (of the next
            document), "padding" (tokens), "cropped" (tokens) and "skipped" (documents without tokens).
        """
        return {
            name: {**standing.tally._asdict(), "epoch": standing.place.cursor[0]}
            for name, standing in zip(self._settings.fingerprints, self._position.sources, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Say where the loader stands, after the batch that was handed out last.

        Returns:
            Plain JSON, equal on all ranks (one copy of it is enough): a few numbers per source, and what the sources
            are made of, so that a resume can say what has changed.
        """
        return dump_state(self._position, self._settings)

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changes: Collection[str] = ()) -> None:
        """Go on where another loader stood, whatever its number of ranks or workers was.

        Stages that had not begun, and sources that no stage so far gave a weight, may differ freely: they change none
        of the batches handed out. All else has to be allowed.

        Args:
            state: what `state_dict` gave, also after a way through JSON.
            allow_changes: what may differ from the saved run: "data" (a source's documents), "mixture" (sources,
                weights, max_epochs), "tokenizer", "seed", "shuffle", "seq_len", "global_batch_size", "packing". Each
                source goes on at its saved place; sources without one begin. Where documents have changed or stand in
                another order, some may be used twice and others not in the epoch under way.

        Raises:
            ChangedDataError: a difference that is not allowed (all are listed).
            DataError: a damaged state, or a read under way that hangs. The loader is in all cases as it was.
        """
        starts = {feed.name: feed.start for feed in self._feeds}
        resume = read_state(state, self._settings, starts, allow_changes)
        standings = tuple(
            standing._replace(
                place=standing.place._replace(
                    cursor=feed.check(standing.place.cursor, lenient=number in resume.lenient)
                )
            )
            for number, (feed, standing) in enumerate(zip(self._feeds, resume.position.sources, strict=True))
        )
        self._stop_reading()
        self._position = resume.position._replace(sources=standings)
        self._reader.resume(self._position, resume.lenient)


def _produce(reader: Reader, pin_memory: bool) -> Callable[[], tuple[Batch, Position]]:
    """Make the function that reads the next batch. It knows nothing of the loader, which can so be freed."""

    def produce() -> tuple[Batch, Position]:
        batch = reader.read()
        if batch is None:
            raise StopIteration
        if pin_memory:
            for key, value in batch.items():
                if isinstance(value, Tensor):
                    batch[key] = value.pin_memory()  # type: ignore[literal-required]
        return batch, reader.position

    return produce


def _parts(sources: Source | Sequence[Weighted]) -> list[Weighted]:
    """List the sources by name: in which order they were given makes no difference to the rows."""
    if isinstance(sources, Sequence) and all(isinstance(part, Weighted) for part in sources):
        parts = [part for part in sources if isinstance(part, Weighted)]
        return sorted(parts, key=lambda part: part.source.name)
    return [Weighted(sources)]  # type: ignore[arg-type]  # whatever else it may be, Weighted tells


def _encoder(tokenizer: Tokenizer | None, share_folder: str | Path | None, sources: Sequence[Source]) -> Encode | None:
    if tokenizer is None:
        return None
    if share_folder is None or all(isinstance(source, TokenSource) for source in sources):
        return partial(encode_documents, tokenizer)
    return TokenShare(share_folder, tokenizer).encode


def _open_packer(feed: Feed, max_epochs: int | None, packing: Packing) -> Packer:
    crop = packing.long_documents == "crop"
    if packing.kind == "concat":
        return Concat(feed, max_epochs)
    if packing.kind == "one_per_row":
        return OnePerRow(feed, max_epochs, crop=crop)
    return BestFit(feed, max_epochs, look_ahead=packing.look_ahead, crop=crop)


def _pad_id(tokenizer: Tokenizer | None) -> int:
    """Choose the token of padding; which one does not matter, as nothing scores it or attends to it."""
    if tokenizer is None:
        return 0
    return next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
