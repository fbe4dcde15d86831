"""Speeds of titan-data, side by side with what else does the same, as a Markdown table.

    python tools/bench_data.py                      # some minutes, some 3 GB of disk
    python tools/bench_data.py --only reading       # one part: reading, mixing, seeking, prepare, tokenizing or waiting
    python tools/bench_data.py --small --rounds 1   # does it run at all?

Every figure is the median of alternating rounds, and every ratio is the median of the rounds' own ratios, so that a
busy moment of the machine hits both sides of it. The text is Python's own library and the packages installed beside
it. What is not installed is left out and named: `datasets` comes with the extra titan-data[huggingface], and torchdata
is nobody's dependency:

    uv run --with torchdata python tools/bench_data.py
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from titan_data import (
    Distribution,
    Fingerprint,
    Loader,
    MixtureSource,
    Packing,
    RandomAccessSource,
    ReadAhead,
    StdlibSource,
    Tokenizer,
)
from titan_data.batching.packing import PackerState
from titan_data.batching.state import dump_state
from titan_data.files.load import load_files
from titan_data.shards.dataset import TokenShards
from titan_data.shards.format import (
    MANIFEST,
    OFFSETS,
    Header,
    Job,
    Manifest,
    ShardEntry,
    shard_name,
    shard_size,
    token_dtype,
)
from titan_data.shards.prepare import prepare as prepare_shards
from titan_data.shards.writer import ShardWriter, write_manifest
from titan_data.tokenizers.load import load_tokenizer
from titan_data.tokenizers.train import train_tokenizer

VOCAB = 32_000
ROWS = 16
MEAN_DOCUMENT = 500


@dataclass(frozen=True)
class Sizes:
    """How much work each measurement is.

    Attributes:
        tokens: in the shards that are read.
        batch_tokens: read from them in one round.
        text_bytes: of real text.
        sparse_tokens: in the index that takes no room; 2 bytes each.
        rounds: how often everything is measured.
    """

    tokens: int
    batch_tokens: int
    text_bytes: int
    sparse_tokens: int
    rounds: int


Row = tuple[str, str, str]  # what, figure, ratio or target


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--folder", type=Path, help="where to put the data; a temporary folder if not given")
    parser.add_argument("--only", choices=PARTS, help="measure this part alone")
    options = parser.parse_args()
    sizes = (
        Sizes(2_000_000, 1_000_000, 1_000_000, 10**9, options.rounds)
        if options.small
        else Sizes(400_000_000, 100_000_000, 100_000_000, 500_000_000_000, options.rounds)
    )
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {sizes.rounds} rounds\n")
    for name in ("datasets", "torchdata", "titan_train"):
        if not find_spec(name):
            print(f"{name} is not installed: its rows are left out\n")
    print("| what | median | against |\n|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for part in [options.only] if options.only else PARTS:
            for row in PARTS[part](folder, sizes):
                print(f"| {' | '.join(row)} |", flush=True)


def measure_reading(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """Packed batches out of token shards, in one process and without reading ahead."""
    source = TokenShards(write_random_shards(folder / "random", sizes.tokens))
    sides = {
        f"packed batches, {kind}, S = {seq_len}": _reading(source, Packing(kind), seq_len, sizes.batch_tokens)
        for kind in ("concat", "best_fit")
        for seq_len in (2048, 8192)
    }
    rates = alternate(sides, sizes.rounds)
    for name, values in rates.items():
        yield name, f"{statistics.median(values) / 1e6:.1f} M tokens/s", "goal: 20 M"


def measure_mixing(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """Steps of a large job on one of its eight ranks, which follows the sequences of all, with one source and many."""
    path = write_random_shards(folder / "mixed", sizes.tokens)
    logging.getLogger("titan_data").setLevel(logging.ERROR)  # that the sources are copies of one another is meant
    steps = max(2, sizes.batch_tokens // (512 * 2048))
    for kind in ("concat", "best_fit"):
        sides = {count: _mixture(path, count, Packing(kind), steps) for count in (1, 10, 100)}
        seconds = alternate({str(count): measure for count, measure in sides.items()}, sizes.rounds)
        for count, values in seconds.items():
            ratio = median_ratio(values, seconds["1"])
            against = "" if count == "1" else f"{ratio:.2f} of one source" + (" (goal: 1.3)" if count == "100" else "")
            what = f"a step of 512 sequences, {kind}, {count} source{'s' * (count != '1')}"
            yield what, f"{1000 * statistics.median(values):.1f} ms", against


def _mixture(path: Path, count: int, packing: Packing, steps: int) -> Callable[[], float]:
    sources = [MixtureSource(TokenShards(path, name=f"source-{number:03d}")) for number in range(count)]
    loader = Loader(
        sources,
        None,
        seq_len=2048,
        global_batch_size=512,
        packing=packing,
        distribution=Distribution(0, 8),
        read_ahead=ReadAhead(prefetch=0),
    )

    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            next(loader)
        return (time.perf_counter() - begin) / steps

    return measure


def measure_seeking(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """The first batch of a huge folder, and the first one after a resume far into it."""
    path = write_sparse_shards(folder / "sparse", sizes.sparse_tokens)
    step = 1_000_000 if sizes.sparse_tokens > 10**11 else 1000

    def open_loader() -> Loader:
        return Loader(TokenShards(path), None, seq_len=4096, global_batch_size=64)

    loader = open_loader()
    next(loader)
    far = far_into(loader, step, len(TokenShards(path)))
    loader.close()

    def first() -> float:
        begin = time.perf_counter()
        next(open_loader())
        return time.perf_counter() - begin

    def resume() -> float:
        begin = time.perf_counter()
        resumed = open_loader()
        resumed.load_state_dict(far)
        next(resumed)
        assert resumed.step == step + 1
        return time.perf_counter() - begin

    size = f"{2 * sizes.sparse_tokens / 1e12:.3g} TB of tokens"
    times = alternate({"first": first, "resume": resume}, sizes.rounds)
    yield f"opening {size}, to the first batch", f"{statistics.median(times['first']):.3f} s", "goal: 1 s"
    yield f"resuming it at step {step:,}, to the batch", f"{statistics.median(times['resume']):.3f} s", "goal: 1 s"


def measure_prepare(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """`prepare` against the same tokenizer that does nothing else: on one core, and on all of them at once.

    What several processes reach together is the machine's own ceiling: they share caches, memory and clock.
    """
    file, tokenizer = write_text(folder, sizes.text_bytes), small_tokenizer(folder)
    source = load_files(file)
    assert isinstance(source, RandomAccessSource)
    texts = [source[i] for i in range(len(source))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sample = texts[::cores]
    sample_bytes = sum(len(text.encode()) for text in sample)
    total_bytes = sum(len(text.encode()) for text in texts)
    rounds = iter(range(1000))

    def bare(clock: Callable[[], float]) -> float:
        begin = clock()
        _encode_all(tokenizer, sample)
        return sample_bytes / (clock() - begin)

    def whole(clock: Callable[[], float], workers: int) -> float:
        begin = clock()
        prepare_shards(source, tokenizer, folder / f"prepared-{next(rounds)}", workers=workers)
        return total_bytes / (clock() - begin)

    with _EncodingProcesses(tokenizer, [texts[i::cores] for i in range(cores)]) as processes:
        sides: dict[str, Callable[[], float]] = {
            "bare": lambda: bare(time.perf_counter),
            "together": lambda: total_bytes / processes.run(),
            "prepare": lambda: whole(time.perf_counter, cores),
            # Processor time: a busy machine lengthens it far less.
            "bare, processor": lambda: bare(time.process_time),
            "prepare, processor": lambda: whole(time.process_time, 0),
        }
        rates = alternate(sides, sizes.rounds)
    of_one = median_ratio(rates["prepare"], [rate * cores for rate in rates["bare"]])
    yield "the tokenizer alone, one core", f"{statistics.median(rates['bare']) / 1e6:.2f} MB/s", ""
    yield (
        f"the tokenizer alone, {cores} simultaneous processes",
        f"{statistics.median(rates['together']) / 1e6:.2f} MB/s",
        f"{median_ratio(rates['together'], [rate * cores for rate in rates['bare']]):.2f} of one core times cores",
    )
    yield (
        f"`prepare`, {cores} cores, {total_bytes / 1e6:.0f} MB",
        f"{statistics.median(rates['prepare']) / 1e6:.2f} MB/s",
        f"{of_one:.2f} of one core times cores (goal: 0.90), "
        f"{median_ratio(rates['prepare'], rates['together']):.2f} of the simultaneous processes",
    )
    yield (
        "`prepare` in one process, per second of processor time",
        f"{statistics.median(rates['prepare, processor']) / 1e6:.2f} MB",
        f"{median_ratio(rates['prepare, processor'], rates['bare, processor']):.2f} of the tokenizer alone",
    )


class _EncodingProcesses:
    """Processes that encode texts of their own, all at once, as often as they are told to."""

    def __init__(self, tokenizer: Tokenizer, shares: list[list[str]]) -> None:
        context = multiprocessing.get_context("fork")
        self._start, self._end = context.Barrier(len(shares) + 1), context.Barrier(len(shares) + 1)
        self._processes = [context.Process(target=self._work, args=(tokenizer, share), daemon=True) for share in shares]

    def __enter__(self) -> Self:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()

    def run(self) -> float:
        """Encode everything once; return how long it took, in seconds."""
        self._start.wait()
        begin = time.perf_counter()
        self._end.wait()
        return time.perf_counter() - begin

    def _work(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        while True:
            self._start.wait()
            _encode_all(tokenizer, texts)
            self._end.wait()


def _encode_all(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts:
        tokenizer.encode(text)


def measure_waiting(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """The share of the debug run's time in which its loop waits for a batch: of texts, tokenized on the way."""
    if not find_spec("titan_train"):
        return
    small_tokenizer(folder)
    steps = 200 if sizes.text_bytes > 10**7 else 5
    settings = {
        "bytes": [],
        "8,192 byte pairs": [("data.tokenizer", str(folder / "tokenizer.model")), ("model.vocab_size", "8192")],
    }
    from bench_data_waiting import waiting_share  # late: it needs titan-train

    shares = alternate(
        {name: partial(waiting_share, folder / "runs", more, steps) for name, more in settings.items()}, sizes.rounds
    )
    for name, values in shares.items():
        found = f"{statistics.median(values):.2%}"
        yield f"debug run, {steps} steps, {name}: waiting for batches", found, "of the loop's time (goal: 1%)"


def measure_tokenizing(folder: Path, sizes: Sizes) -> Iterator[Row]:
    """Batches out of JSON lines, tokenized on the way, against other loaders on the same file and tokenizer."""
    file, tokenizer = write_text(folder, sizes.text_bytes), small_tokenizer(folder)
    steps = max(2, sizes.text_bytes // 4 // (ROWS * 2048) // 4)  # a quarter of the file, at some 4 bytes per token

    def titan(workers: int) -> Callable[[], float]:
        def batches() -> Iterator[Any]:
            return Loader(
                load_files(file), tokenizer, seq_len=2048, global_batch_size=ROWS, read_ahead=ReadAhead(workers=workers)
            )

        return lambda: rate_of(batches(), steps)

    share = folder / "share"

    def after_another_rank() -> float:
        """The rate of a rank that comes second to all texts on its machine."""
        first, second = (
            Loader(
                load_files(file),
                tokenizer,
                seq_len=2048,
                global_batch_size=ROWS,
                distribution=Distribution(rank, 2),
                read_ahead=ReadAhead(prefetch=0),
                share_directory=share,
            )
            for rank in range(2)
        )
        seconds = 0.0
        for number in range(steps + 1):
            next(first)
            begin = time.perf_counter()
            next(second)
            seconds += time.perf_counter() - begin if number else 0.0
        return steps * ROWS * 2048 / seconds

    sides: dict[str, Callable[[], float]] = {
        "titan-data": titan(0),
        "titan-data, 2 workers": titan(2),
        "titan-data, shared by another rank": after_another_rank,
    }
    if find_spec("datasets"):
        sides["datasets streaming + torch DataLoader"] = lambda: rate_of(
            iter(torch.utils.data.DataLoader(_Packed(file, tokenizer), batch_size=ROWS)), steps
        )
        if find_spec("torchdata"):
            stateful = import_module("torchdata.stateful_dataloader").StatefulDataLoader
            sides["datasets streaming + StatefulDataLoader"] = lambda: rate_of(
                iter(stateful(_Packed(file, tokenizer), batch_size=ROWS)), steps
            )
    rates = alternate(sides, sizes.rounds)
    for name, values in rates.items():
        ratio = median_ratio(values, rates["titan-data"])
        yield f"JSON lines to batches: {name}", f"{statistics.median(values) / 1e6:.3f} M tokens/s", f"{ratio:.2f}"


class _Packed(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """What people write by hand around `datasets`: tokenize, lay end to end, cut; no document ids, no exact resume."""

    def __init__(self, file: Path, tokenizer: Tokenizer) -> None:
        self._file = file
        self._tokenizer = tokenizer

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        import datasets  # late: slow to import

        held: list[int] = []
        for record in datasets.load_dataset("json", data_files=str(self._file), split="train", streaming=True):
            held += [*self._tokenizer.encode(record["text"]), self._tokenizer.eos_id or 0]
            while len(held) > 2048:
                row = torch.tensor(held[:2049])
                del held[:2048]
                yield {"tokens": row[:-1], "labels": row[1:]}


def _reading(source: TokenShards, packing: Packing, seq_len: int, tokens: int) -> Callable[[], float]:
    loader = Loader(
        source, None, seq_len=seq_len, global_batch_size=ROWS, packing=packing, read_ahead=ReadAhead(prefetch=0)
    )
    return lambda: rate_of(loader, max(1, tokens // (ROWS * seq_len)))


def rate_of(batches: Iterator[Any], steps: int) -> float:
    """Take one batch to warm up, then some more: tokens per second."""
    next(batches)
    begin = time.perf_counter()
    tokens = sum(batch["tokens"].numel() for batch in islice(batches, steps))
    return float(tokens / (time.perf_counter() - begin))


def alternate(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every side once in each round; the first round is not counted if there are others."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + (rounds > 1)):
        for name, measure in sides.items():
            found[name].append(measure())
    return {name: values[-rounds:] for name, values in found.items()}


def median_ratio(values: list[float], others: list[float]) -> float:
    """Give the median of the rounds' own ratios."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def far_into(loader: Loader, step: int, documents: int) -> dict[str, Any]:
    """Make the state after many steps from the one after the first: how far it is, is all that changes."""
    state = loader._state  # only this benchmark has a reason to make up a state
    (source,) = state.sources
    epoch, index = divmod(source.packer.cursor[1] * step, documents)
    far = source._replace(packer=PackerState((epoch, index)))
    return dump_state(state._replace(step=step, sources=(far,)), loader._settings)


def write_random_shards(folder: Path, tokens: int) -> Path:
    """Write random ids in documents of geometrically distributed lengths, as `prepare` would."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    job = _job()
    entries, first = [], 0
    for number in range(4):
        writer = ShardWriter(folder, number, first, job)
        lengths = generator.geometric(1 / MEAN_DOCUMENT, tokens // 4 // MEAN_DOCUMENT).astype(np.int64)
        writer.append(generator.integers(0, VOCAB, int(lengths.sum()), dtype=np.uint16), lengths)
        entries.append(writer.publish((0, first + len(lengths))).entry(number))
        first += len(lengths)
    write_manifest(folder, job, entries)
    return folder


def write_sparse_shards(folder: Path, tokens: int) -> Path:
    """Write the headers and the index of huge shards whose tokens are holes in the files."""
    folder.mkdir()
    job, length, per_shard = _job(), 5_000, 250_000_000
    entries, documents = [], per_shard // length
    for number in range(tokens // per_shard):
        header = Header(VOCAB, job.tokenizer, number * documents, documents, per_shard, (0, 0), "0" * 64)
        with (folder / shard_name(number)).open("wb") as file:
            file.write(header.pack())
            file.truncate(shard_size(documents, per_shard, token_dtype(VOCAB)))
        entries.append(ShardEntry(shard_name(number), documents, per_shard, header.sha256))
    with (folder / OFFSETS).open("wb") as file:
        for number in range(len(entries)):
            (np.arange(number * documents, (number + 1) * documents, dtype="<i8") * length).tofile(file)
        np.array([tokens], dtype="<i8").tofile(file)
    (folder / MANIFEST).write_bytes(Manifest(job, tuple(entries), "").pack())
    return folder


def _job() -> Job:
    return Job(Fingerprint.of("benchmark", []), "benchmark", VOCAB, None, None, None, 1 << 28)


def write_text(folder: Path, size: int) -> Path:
    """Write the sources of Python's library and of what is installed as JSON lines, up to a size."""
    file = folder / "text.jsonl"
    if file.exists():
        return file
    written = 0
    with file.open("w", encoding="utf-8") as out:
        for text in real_texts():
            written += out.write(json.dumps({"text": text}) + "\n")
            if written >= size:
                return file
    raise SystemExit(
        f"there are only {written / 1e6:.0f} MB of Python files on this machine; {size / 1e6:.0f} are needed"
    )


def real_texts() -> Iterator[str]:
    """Give one text per file: the library first, then packages in the order of their paths."""
    library = StdlibSource()
    yield from (library[i] for i in range(len(library)))
    # `uv run --with` puts an environment of its own before the project's.
    installed = [Path(folder) for folder in sys.path if Path(folder).name == "site-packages"]
    for path in sorted({path for folder in installed for path in folder.rglob("*.py")}):
        if text := path.read_text("utf-8", errors="replace"):
            yield text


def small_tokenizer(folder: Path) -> Tokenizer:
    """Train a byte-pair tokenizer on part of the same text."""
    file = folder / "tokenizer.model"
    if not file.exists():
        library = StdlibSource()
        texts = [library[i] for i in range(0, len(library), 4)]
        file.write_bytes(train_tokenizer(texts, kind="bpe", vocab_size=8192))
    return load_tokenizer(file)


PARTS: dict[str, Callable[[Path, Sizes], Iterator[Row]]] = {
    "reading": measure_reading,
    "mixing": measure_mixing,
    "seeking": measure_seeking,
    "prepare": measure_prepare,
    "tokenizing": measure_tokenizing,
    "waiting": measure_waiting,
}

if __name__ == "__main__":
    main()
