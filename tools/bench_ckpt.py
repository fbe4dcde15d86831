"""How fast titan-ckpt saves and loads, against the disk itself and against torch's distributed checkpoint (DCP).

Every comparison is made within one run on one disk, in rounds that take turns, so that whatever else slows the machine
slows all; the figures are medians over the rounds, the ratios medians of the rounds' ratios. Before a read, the
kernel is asked to drop the files from its memory (unless `--warm`), so that the disk is read.

    python tools/bench_ckpt.py --folder /disk/bench --gib 4 --rounds 5
"""

import argparse
import gc
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from titan_ckpt import Checkpointer, list_checkpoints

CASES = ("sync", "async", "small", "resume", "start")
TENSOR_BYTES = 64 << 20
GIB = 1 << 30


class Held:
    """Tensors as a Stateful."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def state_dict(self) -> dict[str, Any]:
        """Return them."""
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing: they are filled in place."""


def make_tensors(nbytes: int) -> dict[str, torch.Tensor]:
    """Make so many bytes of tensors of 64 MiB, as a model's are."""
    rows = TENSOR_BYTES // (4 * 4096)
    return {f"w{place}": torch.randn(rows, 4096) for place in range(max(1, nbytes // TENSOR_BYTES))}


def bytes_in(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's own memory."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def timed(work: Callable[[], Any]) -> float:
    """Return how long a call takes, in seconds."""
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def forget(folder: Path, warm: bool) -> None:
    """Ask the kernel to drop a folder's files from its memory."""
    if warm:
        return
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def plain_write(path: Path, tensors: Iterable[torch.Tensor]) -> None:
    """Write tensors one after the other to one file, and sync it."""
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            view = bytes_in(tensor)
            while len(view):
                view = view[file.write(view[: 8 << 20]) :]
        os.fsync(file.fileno())


def plain_read(path: Path, tensors: Iterable[torch.Tensor]) -> None:
    """Read the file into tensors, one after the other."""
    with path.open("rb", buffering=0) as file:
        for tensor in tensors:
            view = bytes_in(tensor)
            while len(view):
                view = view[file.readinto(view[: 8 << 20]) or len(view) :]


def dcp_save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Save by DCP, each file synced, as its defaults have it."""
    state_dict_saver.save(dict(tensors), storage_writer=FileSystemWriter(folder), no_dist=True)


def dcp_load(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Load by DCP."""
    state_dict_loader.load(dict(tensors), storage_reader=FileSystemReader(folder), no_dist=True)


def rounds_of(count: int, contestants: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Let all take turns, each round in another order; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(count + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken = contestants[name]()
            if turn:
                times[name].append(taken)
    return times


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def bench_save_and_load(folder: Path, tensors: dict[str, torch.Tensor], count: int, warm: bool) -> list[list[str]]:
    """Compare a save and a load with the plain file and with DCP."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    plain, titan, other = folder / "plain", folder / "titan", folder / "dcp"

    def cleared(path: Path, save: Callable[[], Any]) -> float:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        taken = timed(save)
        assert any(path.iterdir())
        return taken

    def read(path: Path, load: Callable[[], Any]) -> float:
        forget(path, warm)
        for tensor in into.values():
            tensor.zero_()
        taken = timed(load)
        assert all(torch.equal(tensor, into[name]) for name, tensor in tensors.items())
        return taken

    def titan_save() -> None:
        ckpt = Checkpointer(titan)
        ckpt.save(1, {"model": Held(tensors)})
        ckpt.close()

    def titan_load() -> None:
        assert Checkpointer(titan).load({"model": Held(into)}) is not None

    saves = rounds_of(
        count,
        {
            "plain": lambda: cleared(plain, lambda: plain_write(plain / "file", tensors.values())),
            "titan": lambda: cleared(titan, titan_save),
            "DCP": lambda: cleared(other, lambda: dcp_save(other, tensors)),
        },
    )
    loads = rounds_of(
        count,
        {
            "plain": lambda: read(plain, lambda: plain_read(plain / "file", into.values())),
            "titan": lambda: read(titan, titan_load),
            "DCP": lambda: read(other, lambda: dcp_load(other, into)),
        },
    )
    rows = []
    for what, times in (("save", saves), ("load", loads)):
        speeds = {name: nbytes / GIB / statistics.median(taken) for name, taken in times.items()}
        rows.append(
            [
                f"{what}, {len(tensors):,} tensors, {nbytes / GIB:.2f} GiB",
                *(f"{speeds[name]:.2f} GiB/s ({statistics.median(times[name]):.2f} s)" for name in times),
                f"{1 / ratio(times['titan'], times['plain']):.2f}",
                f"{ratio(times['DCP'], times['titan']):.2f}",
            ]
        )
    return rows


def bench_async(folder: Path, nbytes: int, count: int, mode: str) -> list[str]:
    """Compare the time that training is blocked with a copy of the bytes, and steps during a save with others."""
    tensors = make_tensors(nbytes)
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    ckpt = Checkpointer(folder / f"async-{mode}", keep_last=1, asynchronous=mode)  # type: ignore[arg-type]
    a = torch.randn(1024, 1024)
    steps = [0]

    def step() -> None:
        torch.mm(a, a)

    def blocked() -> float:
        steps[0] += 1
        return timed(lambda: ckpt.save(steps[0], {"model": Held(tensors)}))

    def copied() -> float:
        return timed(lambda: [copies[name].copy_(tensor) for name, tensor in tensors.items()])

    ratios, slow = [], []
    for turn in range(count + 1):
        memcpy = copied()
        quiet = statistics.median(timed(step) for _ in range(20))
        taken = blocked()
        in_flight = ckpt._in_flight
        busy = [timed(step)]
        while in_flight is not None and not in_flight.done():
            busy.append(timed(step))
        ckpt.wait()
        if turn:
            ratios.append((taken, memcpy))
            slow.append(statistics.mean(busy) / quiet)
    ckpt.close()
    return [
        f"async ({mode}), {nbytes / GIB:.2f} GiB",
        f"{statistics.median(taken for taken, _ in ratios):.3f} s",
        f"{statistics.median(memcpy for _, memcpy in ratios):.3f} s",
        f"{statistics.median(taken / memcpy for taken, memcpy in ratios):.2f}",
        f"{statistics.median(slow):.2f}",
    ]


def bench_resume(folder: Path, nbytes: int, ranks: int) -> list[str]:
    """Save from so many ranks, and load into as many; each tells its time and its peak of memory."""
    folder = folder / "resume"
    told = {}
    for what in ("save", "load"):
        meeting = folder.parent / f"meeting-{time.monotonic_ns()}"
        command = [sys.executable, __file__, "--worker", what, str(folder), str(nbytes), str(meeting), str(ranks)]
        workers = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(ranks)]
        told[what] = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
    loads = told["load"]
    return [
        f"resume, {ranks} ranks, {nbytes / GIB:.2f} GiB",
        f"{max(one['seconds'] for one in told['save']):.2f} s",
        f"{max(one['seconds'] for one in loads):.2f} s",
        f"{max(one['peak'] - one['before'] for one in loads) / GIB:.3f} GiB",
        f"{nbytes / ranks / GIB:.3f} GiB",
    ]


def worker(what: str, folder: str, nbytes: str, meeting: str, ranks: str, rank: str) -> None:
    """Be one rank of `bench_resume`; the weights are sharded over all ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(ranks))
    mesh = init_device_mesh("cpu", (int(ranks),))
    rows = TENSOR_BYTES // (4 * 4096) // int(ranks)
    tensors = {
        f"w{place}": DTensor.from_local(torch.ones(rows, 4096) * (place + 1), mesh, [Shard(0)])
        for place in range(max(1, int(nbytes) // TENSOR_BYTES))
    }
    if what == "load":
        for tensor in tensors.values():
            tensor.to_local().zero_()
    ckpt = Checkpointer(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    dist.barrier()
    state = {"model": Held(dict(tensors))}
    seconds = timed(lambda: ckpt.save(1, state) if what == "save" else ckpt.load(state, required=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert all((tensor.to_local() == place + 1).all() for place, tensor in enumerate(tensors.values()))
    ckpt.close()
    print(json.dumps({"seconds": seconds, "before": before, "peak": peak}))
    dist.destroy_process_group()


def bench_start(folder: Path, count: int) -> list[str]:
    """Find and load the newest of a thousand checkpoints."""
    folder = folder / "many"
    ckpt = Checkpointer(folder)
    state = {"model": Held({"w": torch.ones(1000)})}
    for step in range(1000):
        ckpt.save(step, state)
    ckpt.close()
    loads = [timed(lambda: Checkpointer(folder).load(state)) for _ in range(count)]
    lists = [timed(lambda: list_checkpoints(str(folder))) for _ in range(count)]
    return [
        "start among 1,000 checkpoints",
        f"{statistics.median(loads):.3f} s to load the newest",
        f"{statistics.median(lists):.3f} s to list all",
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    """Measure what is asked for and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a folder on the disk to measure; it is emptied")
    parser.add_argument("--gib", type=float, default=1.0, help="how much to save, in GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=8, help="of the resume")
    parser.add_argument("--small", type=int, default=10_000, help="how many small tensors")
    parser.add_argument("--warm", action="store_true", help="read from the kernel's memory rather than from the disk")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    asked = parser.parse_args()
    folder, nbytes = asked.folder / "bench-ckpt", int(asked.gib * GIB)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {asked.rounds} rounds\n")
    compared = []
    if "sync" in asked.only:
        compared += bench_save_and_load(folder, make_tensors(nbytes), asked.rounds, asked.warm)
    if "small" in asked.only:
        small = {f"layers.{place}.scale": torch.randn(256) for place in range(asked.small)}
        compared += bench_save_and_load(folder, small, asked.rounds, asked.warm)
    if compared:
        heads = ["", "plain file, fsync", "titan-ckpt", "DCP", "titan-ckpt / plain", "titan-ckpt / DCP"]
        print(table(heads, compared))
    if "async" in asked.only:
        heads = ["", "blocked", "memcpy of the bytes", "blocked / memcpy", "steps during the save, in times of others"]
        print(table(heads, [bench_async(folder, nbytes, asked.rounds, mode) for mode in ("thread", "process")]))
    if "resume" in asked.only:
        heads = ["", "save", "load", "peak memory over the state, per rank", "state per rank"]
        print(table(heads, [bench_resume(folder, nbytes, asked.ranks)]))
    if "start" in asked.only:
        print(table(["", "newest", "all"], [bench_start(folder, asked.rounds)]))
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
