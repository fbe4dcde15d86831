"""How fast titan-ckpt saves and loads, against the disk itself and against torch's distributed checkpoint (DCP).

Every comparison is made within one run on one disk, in rounds that take turns, so that whatever else slows the machine
slows all; the figures are medians over the rounds, the ratios medians of the rounds' ratios. Before a read, the
kernel is asked to drop the files from its memory (unless `--warm`), so that the disk is read. What is written is synced
to the disk within the time that is measured, by all contestants.

    python tools/bench_ckpt.py --folder /disk/bench --gib 4 --rounds 5

needs twice the size in memory and three times on the disk. The resume has a size of its own, `--resume-gib`.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
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

from titan_ckpt import Checkpointer, list_checkpoints, verify

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


class Contest:
    """The same tensors saved and loaded by a plain file, by titan-ckpt and by DCP."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor], warm: bool) -> None:
        self.tensors, self.warm = tensors, warm
        self.into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self.plain, self.titan, self.dcp = folder / "plain", folder / "titan", folder / "dcp"

    def saves(self) -> dict[str, Callable[[], float]]:
        """Return who takes part in saving: each saves once and tells how long it took."""
        return {
            "plain": lambda: self._save(self.plain, lambda: plain_write(self.plain / "file", self.tensors.values())),
            "titan": lambda: self._save(self.titan, self._titan_save),
            "DCP": lambda: self._save(self.dcp, lambda: dcp_save(self.dcp, self.tensors)),
        }

    def loads(self) -> dict[str, Callable[[], float]]:
        """Return who takes part in loading what was saved last."""
        return {
            "plain": lambda: self._load(self.plain, lambda: plain_read(self.plain / "file", self.into.values())),
            "titan": lambda: self._load(self.titan, self._titan_load),
            "DCP": lambda: self._load(self.dcp, lambda: dcp_load(self.dcp, self.into)),
        }

    def checks(self) -> dict[str, Callable[[], float]]:
        """Return who takes part in looking for damage in what was saved last, which DCP has no way to do."""
        return {"plain": self.loads()["plain"], "titan": self._titan_check}

    def _titan_check(self) -> float:
        forget(self.titan, self.warm)
        found: list[str] = []
        taken = timed(lambda: found.extend(verify(self.titan / "step-00000001", "checksum")))
        assert found == []
        return taken

    def _titan_save(self) -> None:
        ckpt = Checkpointer(self.titan)
        ckpt.save(1, {"model": Held(self.tensors)})
        ckpt.close()

    def _titan_load(self) -> None:
        assert Checkpointer(self.titan).load({"model": Held(self.into)}) is not None

    def _save(self, path: Path, save: Callable[[], Any]) -> float:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        taken = timed(save)
        assert any(path.iterdir())
        return taken

    def _load(self, path: Path, load: Callable[[], Any]) -> float:
        forget(path, self.warm)
        for tensor in self.into.values():
            tensor.zero_()
        taken = timed(load)
        assert all(torch.equal(tensor, self.into[name]) for name, tensor in self.tensors.items())
        return taken


def bench_save_and_load(folder: Path, tensors: dict[str, torch.Tensor], count: int, warm: bool) -> list[list[str]]:
    """Compare a save, a load and a check of every byte with the plain file and with DCP."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    contest, rows = Contest(folder, tensors, warm), []
    for what, contestants in (("save", contest.saves()), ("load", contest.loads()), ("verify", contest.checks())):
        times = rounds_of(count, contestants)
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        speeds = {name: f"{nbytes / GIB / seconds:.2f} GiB/s ({seconds:.2f} s)" for name, seconds in medians.items()}
        ratios = {name: f"{ratio(taken, times['titan']):.2f}" for name, taken in times.items()}
        rows.append(
            [
                f"{what}, {len(tensors):,} tensors, {nbytes / GIB:.2f} GiB",
                *(speeds.get(name, "") for name in ("plain", "titan", "DCP")),
                *(ratios.get(name, "") for name in ("plain", "DCP")),
            ]
        )
    shutil.rmtree(folder)
    return rows


class Saver:
    """A Checkpointer that saves in the background while steps go on."""

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.state = {"model": Held(tensors)}
        self.published = threading.Event()
        self.ckpt = Checkpointer(
            folder / "async",
            keep_last=1,
            asynchronous=True,
            exporters=[lambda _: self.published.set()],
        )

    def begin(self, turn: int) -> None:
        """Save, as far as that blocks."""
        self.published.clear()
        self.ckpt.save(turn, self.state)

    def done(self) -> bool:
        """Tell whether it is published."""
        return self.published.is_set()

    def end(self) -> None:
        """Wait for what follows publication."""
        self.ckpt.wait()


class PlainWriter:
    """Another program that writes as many bytes: what steps lose to it, they lose to the disk and its driver."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.path = folder / "plain"
        self.command = ["dd", "if=/dev/zero", f"of={self.path}", "bs=8M", f"count={nbytes >> 23}", "oflag=direct"]
        self.process: subprocess.Popen[bytes] | None = None

    def begin(self, turn: int) -> None:
        """Start it."""
        self.path.unlink(missing_ok=True)
        self.process = subprocess.Popen([*self.command, "conv=fsync"], stderr=subprocess.DEVNULL)

    def done(self) -> bool:
        """Tell whether it has ended."""
        return self.process is not None and self.process.poll() is not None

    def end(self) -> None:
        """See that it wrote."""
        assert self.process is not None
        assert self.process.wait() == 0


def watch(saver: Saver | PlainWriter, turn: int, step: Callable[[], None]) -> tuple[float, list[float], float]:
    """Save; return how long that blocked, how long each step took until it was published, and when that was."""
    started = time.perf_counter()
    saver.begin(turn)
    blocked, steps = time.perf_counter() - started, []
    while not saver.done():
        before = time.perf_counter()
        step()
        steps.append(time.perf_counter() - before)
    whole = time.perf_counter() - started
    saver.end()
    return blocked, steps, whole


def products() -> Callable[[], None]:
    """Return a step of matrix products, which wants all cores."""
    a = torch.randn(1024, 1024)

    def step() -> None:
        torch.mm(a, a)

    return step


def small_operations() -> Callable[[], None]:
    """Return a step of many small operations, which wants one core and the interpreter's lock, as on a GPU."""
    a = torch.randn(8)

    def step() -> None:
        for _ in range(2000):
            a.mul(2)

    return step


def bench_async(folder: Path, nbytes: int, count: int) -> list[list[str]]:
    """Compare the time that training is blocked with a copy of the bytes, and steps during a save with others.

    The contestants take turns, each with both kinds of steps. The first save allocates the memory and counts by itself.
    """
    tensors = make_tensors(nbytes)
    copies = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    savers: dict[str, Saver | PlainWriter] = {
        "titan-ckpt": Saver(folder, tensors),
        "dd, direct": PlainWriter(folder, nbytes),
    }
    kinds = {"products": products(), "small operations": small_operations()}

    def copy() -> None:
        for name, tensor in tensors.items():
            copies[name].copy_(tensor)

    first = {mode: watch(saver, 0, kinds["products"])[0] for mode, saver in savers.items()}
    told: dict[tuple[str, str], list[tuple[float, ...]]] = {(mode, kind): [] for kind in kinds for mode in savers}
    for turn in range(1, 2 * count + 1):
        kind = list(kinds)[turn % 2]
        for mode in [*savers, *savers][turn // 2 % len(savers) :][: len(savers)]:
            copied = statistics.median(timed(copy) for _ in range(3))
            quiet = statistics.median(timed(kinds[kind]) for _ in range(20))
            blocked, steps, whole = watch(savers[mode], turn, kinds[kind])
            lost = sum(steps) - quiet * len(steps)
            told[mode, kind].append((blocked, copied, blocked / copied, sum(steps) / len(steps) / quiet, lost, whole))
    for saver in savers.values():
        if isinstance(saver, Saver):
            saver.ckpt.close()
    rows = []
    for (mode, kind), rounds in told.items():
        blocked, copied, over, slower, lost, whole = (statistics.median(column) for column in zip(*rounds, strict=True))
        figures = [f"{first[mode]:.2f} s", f"{blocked:.3f} s", f"{copied:.3f} s", f"{over:.2f}"]
        if not isinstance(savers[mode], Saver):
            figures = [""] * len(figures)
        rows.append([f"{mode}; {kind}", *figures, f"{whole:.2f} s", f"{slower:.2f}", f"{lost:.2f} s"])
    return rows


def bench_resume(folder: Path, nbytes: int, ranks: int, warm: bool) -> list[str]:
    """Save from so many ranks, and load into as many; each tells its time and its peak of memory."""
    folder = folder / "resume"
    told = {}
    for what in ("save", "load"):
        forget(folder, warm)
        meeting = folder.parent / f"meeting-{time.monotonic_ns()}"
        command = [sys.executable, __file__, "--worker", what, str(folder), str(nbytes), str(meeting), str(ranks)]
        workers = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(ranks)]
        told[what] = [json.loads(worker.communicate()[0].splitlines()[-1]) for worker in workers]
    loads = told["load"]
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    shutil.rmtree(folder)
    return [
        f"{ranks} ranks, {size / GIB:.2f} GiB",
        f"{max(one['seconds'] for one in told['save']):.2f} s",
        f"{max(one['seconds'] for one in loads):.2f} s",
        f"{size / ranks / GIB:.3f} GiB",
        f"{max(one['peak'] - one['before'] for one in loads) / GIB:.3f} GiB",
        f"{max(one['peak'] for one in loads) / GIB:.3f} GiB",
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
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    before = memory("VmRSS")
    dist.barrier()
    state = {"model": Held(dict(tensors))}
    seconds = timed(lambda: ckpt.save(1, state) if what == "save" else ckpt.load(state, required=True))
    peak = memory("VmHWM")
    assert all((tensor.to_local() == place + 1).all() for place, tensor in enumerate(tensors.values()))
    ckpt.close()
    print(json.dumps({"seconds": seconds, "before": before, "peak": peak}))
    dist.destroy_process_group()


def memory(which: str) -> int:
    """Return this process's memory at present (VmRSS) or at its peak (VmHWM), in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def bench_start(folder: Path, checkpoints: int, count: int) -> list[str]:
    """Find and load the newest of many checkpoints, list them, and save another one."""
    folder = folder / "many"
    state = {"model": Held({"w": torch.ones(1000)})}
    ckpt = Checkpointer(folder)
    for step in range(checkpoints):
        ckpt.save(step, state)
    ckpt.close()
    loads = [timed(lambda: Checkpointer(folder).load(state)) for _ in range(count)]
    lists = [timed(lambda: list_checkpoints(str(folder))) for _ in range(count)]
    saving = Checkpointer(folder, keep_last=checkpoints)
    saving.load(state)
    saves = [timed(lambda step=step: saving.save(checkpoints + step, state)) for step in range(count)]  # type: ignore[misc]
    saving.close()
    shutil.rmtree(folder)
    figures = (f"{statistics.median(taken):.3f} s" for taken in (loads, lists, saves))
    return [f"{checkpoints:,} checkpoints", *figures]


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
    parser.add_argument("--resume-gib", type=float, default=5.0, help="how much the resume is of, in GiB")
    parser.add_argument("--small", type=int, default=10_000, help="how many small tensors")
    parser.add_argument("--checkpoints", type=int, default=1000, help="how many old checkpoints at start-up")
    parser.add_argument("--warm", action="store_true", help="read from the kernel's memory rather than from the disk")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    asked = parser.parse_args()
    folder, nbytes = asked.folder / "bench-ckpt", int(asked.gib * GIB)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {asked.rounds} rounds\n")
    compared = []
    if "sync" in asked.only:
        compared += bench_save_and_load(folder / "sync", make_tensors(nbytes), asked.rounds, asked.warm)
    if "small" in asked.only:
        small = {f"layers.{place}.scale": torch.randn(256) for place in range(asked.small)}
        compared += bench_save_and_load(folder / "small", small, asked.rounds, asked.warm)
    if compared:
        heads = ["", "plain file, fsync", "titan-ckpt", "DCP", "speed / plain", "speed / DCP"]
        print(table(heads, compared), flush=True)
    if "async" in asked.only:
        heads = [
            f"asynchronous, {nbytes / GIB:.2f} GiB",
            "first blocked",
            "blocked",
            "memcpy of the bytes",
            "blocked / memcpy",
            "until published",
            "steps meanwhile / others",
            "time lost to steps",
        ]
        print(table(heads, bench_async(folder, nbytes, asked.rounds)), flush=True)
    if "resume" in asked.only:
        heads = ["resume", "save", "load", "state per rank", "peak memory over it, per rank", "peak in all"]
        rows = [bench_resume(folder, int(asked.resume_gib * GIB), asked.ranks, asked.warm)]
        print(table(heads, rows), flush=True)
    if "start" in asked.only:
        heads = ["start-up among", "load the newest", "list all", "save one more"]
        print(table(heads, [bench_start(folder, asked.checkpoints, asked.rounds)]))
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
