"""The private parts of torch that titan-train uses, in one place: a torch release that changes them breaks this file.

Tried with torch 2.11 to 2.15.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs


class NotifyingAgent(LocalElasticAgent):
    """torch's elastic agent for the processes of one machine, which reports the processes that it has started.

    Private: `LocalElasticAgent._start_workers`. torch 2.15 has no public way to learn the workers' process ids, nor a
    hook between the start of the workers and the wait for them. It may go when there is one.

    Args:
        spec: What to run.
        logs: Where the workers' output goes.
        on_start: Called with the process ids each time the workers have been started.
    """

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, on_start: Callable[[tuple[int, ...]], None]) -> None:
        super().__init__(spec, logs)
        self._on_start = on_start

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._on_start(tuple(started.values()))
        return started
