"""`--nproc N`: start processes on this machine through torch's elastic agent, and wait for them.

Called by `titan_train.cli`. Each process runs `python -m titan_train` with the same command line.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from types import FrameType

import torch.distributed.elastic.rendezvous.registry as rendezvous
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters

from titan_train._torch_compat import NotifyingAgent
from titan_train.errors import ExitCode


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `titan-train` with `arguments` in several processes and wait for them.

    Args:
        processes: Number of processes.
        arguments: The command line, without `--nproc`.

    Returns:
        The exit code of the first worker that did not end with 0, else 0.
    """
    # Each worker prints its own error; the agent's report would bury it.
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
        agent = NotifyingAgent(spec, DefaultLogsSpecs(log_dir=logs), _forward_signals)
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


def _forward_signals(pids: tuple[int, ...]) -> None:
    """Pass SIGTERM and SIGINT on to the workers from now on, and let them end by themselves.

    torch's agent would end the workers within a fixed time; titan-train's finish their step and save first.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
