"""The loader: global batch n is a function of (sources, tokenizer, settings, seed, n), and of nothing else."""

import logging
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from titan_data.batching.batch import Batch
from titan_data.batching.changes import saved_identities
from titan_data.batching.checks import as_int, check_batch_size, check_tokenizers
from titan_data.batching.feeds import Feed, open_feed
from titan_data.batching.global_batches import GlobalBatchReader, ReaderState
from titan_data.batching.mixing import MixtureSource, Phase, resolve_phases
from titan_data.batching.opening import encoder, list_parts, open_packer, pad_id, vocab_size, warn_of_copies
from titan_data.batching.options import Distribution, ReadAhead
from titan_data.batching.packing import Packing
from titan_data.batching.prefetch import Prefetcher
from titan_data.batching.settings import LoaderSettings
from titan_data.batching.state import check_state, dump_state, read_state
from titan_data.errors import DataError
from titan_data.files.inputs import inputs_of
from titan_data.sources.base import Source, identity_of
from titan_data.tokenizers.base import Tokenizer

_EXIT_SECONDS = 5.0  # how long a read that hangs (on a network, say) is waited for when the process exits …
_CLOSE_SECONDS = 60.0  # … or when the loader is closed; building a large batch may take a while

_log = logging.getLogger(__name__)


class Loader:
    """An iterator over this rank's sequences of global batch 0, 1, 2, …, resumable on any number of ranks.

    A source's documents, in a new order for each epoch, form one endless queue, which is cut into sequences as
    `packing` says. Each sequence comes from one source, and sources advance independently. Each document is used once
    per epoch, and epochs follow one another without end unless `max_epochs` ends them.

    Args:
        sources: Where documents come from: one source, or several with their weights, in any order.
        tokenizer: Turns texts into ids. With token sources it only serves as a check (fingerprint, vocabulary) and may
            be None.
        seq_len: S, tokens per sequence.
        global_batch_size: G, sequences per step over all ranks; a multiple of `world_size`.
        seed: Seed of the shuffle.
        shuffle: Shuffle the documents of each epoch. A stream keeps its own order.
        packing: How documents become sequences; `Packing()`, which is "concat", if None.
        phases: Changes of weights or S at given steps, in the order of their steps.
        distribution: This rank's share of each batch; all of it if None.
        read_ahead: Prefetching and worker threads; `ReadAhead()` if None. Changes nothing in the batches.
        share_directory: A directory on this machine's own disk through which the loaders of its ranks share tokenized
            texts, so that each text is tokenized once per machine instead of once per rank. For one job only; the
            loaders create and clear it. Changes nothing in the batches.

    Raises:
        DataError: If sizes, sources or phases do not fit together, or a source cannot be used.

    Example:
        >>> from titan_data import ByteTokenizer, ListSource, Loader
        >>> loader = Loader(ListSource(["one", "two"]), ByteTokenizer(), seq_len=8, global_batch_size=2, shuffle=False)
        >>> next(loader)["tokens"]
        tensor([[256, 111, 110, 101, 257, 256, 116, 119],
                [111, 257, 256, 111, 110, 101, 257, 256]])
        >>> state = loader.state_dict()  # JSON; resumes on any number of ranks
        >>> loader.close()
    """

    def __init__(
        self,
        sources: Source | Sequence[MixtureSource],
        tokenizer: Tokenizer | None,
        *,
        seq_len: int,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        packing: Packing | None = None,
        phases: Sequence[Phase] = (),
        distribution: Distribution | None = None,
        read_ahead: ReadAhead | None = None,
        share_directory: str | Path | None = None,
    ) -> None:
        distribution = distribution or Distribution()
        seed, seq_len = as_int("seed", seed), as_int("seq_len", seq_len)
        global_batch_size, shuffle = as_int("global_batch_size", global_batch_size), bool(shuffle)
        self._read_ahead = read_ahead or ReadAhead()
        check_batch_size(global_batch_size, distribution.world_size)
        self._parts = list_parts(sources)
        self._sources = [part.source for part in self._parts]
        self._global_batch_size, self._seed, self._shuffle = global_batch_size, seed, shuffle
        self._packing, self._seq_len, self._phases = packing or Packing(), seq_len, phases
        self._tokenizer, self._distribution = tokenizer, distribution
        self._fingerprints = {source.name: source.fingerprint() for source in self._sources}
        warn_of_copies(self._fingerprints)
        self._settings = self._resolve_settings(
            {source.name: identity_of(source, self._fingerprints[source.name]) for source in self._sources}
        )
        check_tokenizers(self._sources, tokenizer)
        self._encode = encoder(tokenizer, share_directory, self._sources)
        workers = self._read_ahead.workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="titan-data-tokenize") if workers > 0 else None
        if self._pool is not None:
            weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        self._feeds = self._open_feeds(self._settings)
        self._reader = self._open_reader(self._settings, self._feeds)
        self._state = self._reader.state  # after the batch returned last; the reader may be ahead
        self._prefetcher: Prefetcher[tuple[Batch, ReaderState]] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def _resolve_settings(self, identities: Mapping[str, str]) -> LoaderSettings:
        """Make the settings, with the sources in the order of their identities.

        So neither the order of the arguments nor a name that was derived from a path changes the batches.
        """
        parts = sorted(self._parts, key=lambda part: (identities[part.source.name], part.source.name))
        names = [part.source.name for part in parts]
        return LoaderSettings(
            seed=self._seed,
            shuffle=self._shuffle,
            tokenizer=None if self._tokenizer is None else self._tokenizer.fingerprint,
            global_batch_size=self._global_batch_size,
            packing=self._packing,
            phases=resolve_phases(parts, self._seq_len, self._phases),
            fingerprints={name: self._fingerprints[name] for name in names},
            max_epochs={part.source.name: part.max_epochs for part in parts},
            identities={name: identities[name] for name in names},
            named=frozenset(source.name for source in self._sources if getattr(source, "named", True)),
        )

    def _ordered_parts(self, settings: LoaderSettings) -> list[MixtureSource]:
        by_name = {part.source.name: part for part in self._parts}
        return [by_name[name] for name in settings.fingerprints]

    def _open_feeds(self, settings: LoaderSettings) -> list[Feed]:
        return [
            open_feed(
                part.source,
                settings.identities[part.source.name],
                self._encode,
                seed=settings.seed,
                shuffle=settings.shuffle,
                pool=self._pool,
                workers=self._read_ahead.workers,
            )
            for part in self._ordered_parts(settings)
        ]

    def _open_reader(self, settings: LoaderSettings, feeds: Sequence[Feed]) -> GlobalBatchReader:
        packing, global_batch_size = settings.packing, settings.global_batch_size
        own = global_batch_size // self._distribution.world_size
        parts = self._ordered_parts(settings)
        return GlobalBatchReader(
            parts,
            [open_packer(feed, part.max_epochs, packing) for feed, part in zip(feeds, parts, strict=True)],
            settings.phases,
            global_batch_size=global_batch_size,
            own=range(self._distribution.rank * own, (self._distribution.rank + 1) * own),
            cross_document=packing.cross_document,
            pad_id=pad_id(self._tokenizer),
            vocab_size=vocab_size(self._tokenizer, self._sources),
        )

    @property
    def step(self) -> int:
        """Number of global batches returned so far."""
        return self._state.step

    @property
    def tokens_per_step(self) -> int:
        """G * S of the next global batch, padding included."""
        return self._settings.global_batch_size * self._reader.phase(self.step).seq_len

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        produce = _produce(self._reader, pin_memory=self._read_ahead.pin_memory)
        if self._read_ahead.prefetch == 0:
            batch, self._state = produce()
            return batch
        if self._prefetcher is not None and self._prefetcher.closed:
            self._stop_reading()
        if self._prefetcher is None or self._prefetcher.ended:
            self._prefetcher = Prefetcher(produce, self._read_ahead.prefetch)
            # When the loader is freed or Python exits: the thread must end before numpy and torch are torn down.
            self._finalizer = weakref.finalize(self, self._prefetcher.close, _EXIT_SECONDS)
        try:
            batch, self._state = self._prefetcher.get(self._read_ahead.patience, self._warn)
        finally:
            if self._prefetcher.ended:
                self.close()
        return batch

    def _warn(self, seconds: float) -> None:
        _log.warning("no batch for %g s: step %d is being read%s", seconds, self.step, self._in_file())

    def _in_file(self) -> str:
        reading = None if self._prefetcher is None else self._prefetcher.reading
        return "" if reading is None else f", in {reading}"

    def close(self) -> None:
        """Stop reading ahead. Asking for another batch starts it again; nothing is skipped.

        A read that hangs is waited for up to a minute and then abandoned, with a warning.
        """
        try:
            self._stop_reading()
        except DataError as error:
            _log.warning("%s", error)

    def _stop_reading(self) -> None:
        """End the prefetch thread.

        Raises:
            DataError: If a read hangs. Nothing can be read then, as two threads must not read one source.
        """
        if self._prefetcher is None:
            return
        if not self._prefetcher.close(_CLOSE_SECONDS):
            raise DataError(
                f"a read has been hanging for {_CLOSE_SECONDS:g} s{self._in_file()}: check that the storage is "
                "reachable, then try again or restart the process; the loader is still at step "
                f"{self.step}"
            )
        if self._finalizer is not None:
            self._finalizer.detach()
        self._prefetcher = self._finalizer = None
        self._reader.seek(self._state)

    def accounting(self) -> dict[str, dict[str, int]]:
        """Return counts of what has been returned so far, over all ranks.

        Returns:
            For each source by name: "tokens" (without padding), "documents" (completed), "epoch" (of the next
            document), "padding" (tokens), "cropped" (tokens) and "skipped" (documents without tokens).
        """
        return {
            name: {**source.counts._asdict(), "epoch": source.packer.cursor[0]}
            for name, source in zip(self._settings.fingerprints, self._state.sources, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state after the batch returned last.

        Returns:
            JSON values, equal on all ranks (one copy is enough): a few numbers per source, and the sources'
            fingerprints, so that a resume can report what has changed.
        """
        return dump_state(self._state, self._settings)

    def load_state_dict(self, state: Mapping[str, Any], *, allow_changes: Collection[str] = ()) -> None:
        """Continue from the state of another loader, whatever its number of ranks or workers.

        Phases that had not begun, and sources that have had no weight so far, may differ freely: they change none of
        the batches returned so far. All other changes have to be allowed.

        Args:
            state: What `state_dict` returned, also after a round trip through JSON.
            allow_changes: What may differ from the saved run: "data" (a source's documents), "mixture" (sources,
                weights, max_epochs), "tokenizer", "seed", "shuffle", "seq_len", "global_batch_size", "packing". Each
                source continues at its saved cursor; sources without one start from the beginning. If documents have
                changed or are in another order, some may be used twice and others not at all in the current epoch.

        Raises:
            ChangedDataError: If anything differs that is not allowed; all differences are listed.
            DataError: If the state is corrupt, or a current read hangs. The loader is left unchanged in all cases.
        """
        check_state(state, allow_changes)
        settings, feeds, reader = self._settings, self._feeds, self._reader
        if (identities := saved_identities(state, settings)) != settings.identities:
            # The saved run's order, under whatever name the sources are now.
            settings = self._resolve_settings(identities)
            feeds = self._open_feeds(settings)
            reader = self._open_reader(settings, feeds)
        starts = {feed.name: feed.start for feed in feeds}
        resume = read_state(state, settings, starts, allow_changes)
        sources = []
        for number, (feed, source) in enumerate(zip(feeds, resume.reader.sources, strict=True)):
            cursor = feed.check(source.packer.cursor, lenient=number in resume.lenient)
            sources.append(source._replace(packer=source.packer._replace(cursor=cursor)))
        self._log_what_was_compared()
        self._stop_reading()
        self._settings, self._feeds, self._reader = settings, feeds, reader
        self._state = resume.reader._replace(sources=tuple(sources))
        self._reader.resume(self._state, resume.lenient)

    def _log_what_was_compared(self) -> None:
        for source in self._sources:
            if (inputs := inputs_of(source)) is not None:
                _log.info(
                    "source %r: its %d files are compared with the saved run by name, size, first and last 64 KiB; "
                    "an edit between, which keeps the size, is not seen",
                    source.name,
                    len(inputs),
                )


def _produce(reader: GlobalBatchReader, *, pin_memory: bool) -> Callable[[], tuple[Batch, ReaderState]]:
    """Make the function that reads the next batch. It holds no reference to the loader, which can so be freed."""

    def produce() -> tuple[Batch, ReaderState]:
        batch = reader.read()
        if batch is None:
            raise StopIteration
        if pin_memory:
            for key, value in batch.items():
                if isinstance(value, Tensor):
                    batch[key] = value.pin_memory()  # type: ignore[literal-required]
        return batch, reader.state

    return produce
