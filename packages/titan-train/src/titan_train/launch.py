"""Several processes on this machine, through torch's elastic agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch.distributed.elastic.rendezvous.registry as rendezvous
from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters

from titan_train.errors import ExitCode


class _ForwardingAgent(LocalElasticAgent):
    """Passes signals on to the workers and lets them end by themselves.

    torch's agent answers a signal by ending the workers within a fixed time; ours finish their step and save first.
    """

    _workers: tuple[int, ...] = ()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._workers = tuple(started.values())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        return started

    def _forward(self, number: int, frame: FrameType | None) -> None:
        for pid in self._workers:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `titan-train` with `arguments` in several processes and wait for them.

    Args:
        processes: How many.
        arguments: The command line, without `--nproc`.

    Returns:
        The exit code of the first worker that did not end with 0, else 0.
    """
    # Each worker says itself what went wrong; the agent's report would bury it.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    run_id = uuid.uuid4().hex
    parameters = RendezvousParameters(
        backend="c10d", endpoint="localhost:0", run_id=run_id, min_nodes=1, max_nodes=1, is_host=True
    )
    handler = rendezvous.get_rendezvous_handler(parameters)
    with tempfile.TemporaryDirectory(prefix="titan-train-") as logs:
        spec = WorkerSpec(
            role="titan-train",
            local_world_size=processes,
            entrypoint=sys.executable,
            args=("-m", "titan_train", *arguments),
            rdzv_handler=handler,
            max_restarts=0,
            monitor_interval=0.1,
        )
        agent = _ForwardingAgent(spec, DefaultLogsSpecs(log_dir=logs))
        try:
            result = agent.run()
        finally:
            handler.shutdown()
    if not result.is_failed():
        return ExitCode.DONE
    codes = [failure.exitcode for failure in result.failures.values()]
    stopped = [code for code in codes if code == ExitCode.STOPPED]
    code: int = (stopped or codes or [ExitCode.FAILED])[0]
    return code if code >= 0 else 128 - code
