"""A process group on gloo for tests: spawned ranks that run one function and report back, or are killed in time."""

import queue
import tempfile
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
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=_rank, args=(rank, world, store, results, function, args), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        try:
            answers = dict(_receive(results) for _ in ranks)
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return [answers[rank] for rank in range(world)]


def _receive(results: Any) -> tuple[int, Any]:
    try:
        rank, answer, error = results.get(timeout=SECONDS)
    except queue.Empty:
        raise TimeoutError(f"a rank was silent for {SECONDS} s") from None
    assert error is None, f"rank {rank}:\n{error}"
    return rank, answer


def _rank(
    rank: int, world: int, store: str, results: Any, function: Callable[..., Any], args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS)
        )
        # Plain lists: a tensor sent through a queue lives only as long as its sender.
        results.put((rank, function(*args), None))
        results.close()
        results.join_thread()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        results.close()
        results.join_thread()
