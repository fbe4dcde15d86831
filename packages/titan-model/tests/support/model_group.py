"""A process group on gloo for tests: ranks that run one function and report back, or are killed in time."""

import queue
import runpy
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 120


def run_ranks(world: int, function: Callable[..., Any], *args: object) -> list[Any]:
    """Call `function(*args)` on `world` ranks of a gloo group and return what each of them returned."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.tensor"])
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=_rank, args=(rank, world, store, results, *_named(function), args), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            answers = dict(_receive(results, ranks) for _ in ranks)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return [answers[rank] for rank in range(world)]


def _named(function: Callable[..., Any]) -> tuple[str, str]:
    # pytest names a test's module by its path from the root; a new process loads it from its file.
    return function.__code__.co_filename, function.__qualname__


def _receive(results: Any, ranks: list[Any]) -> tuple[int, Any]:
    deadline = time.monotonic() + SECONDS
    while True:
        died = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        try:
            rank, answer, error = results.get(timeout=1)
        except queue.Empty:
            assert not died, f"rank {died[0]} died with exit code {ranks[died[0]].exitcode} (its words are on stderr)"
            assert time.monotonic() < deadline, f"a rank was silent for {SECONDS} s"
            continue
        assert error is None, f"rank {rank}:\n{error}"
        return rank, answer


def _rank(rank: int, world: int, store: str, results: Any, file: str, name: str, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
        )
        function = runpy.run_path(file)[name]
        # Plain lists: a tensor sent through a queue lives only as long as its sender.
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    results.close()
    results.join_thread()
