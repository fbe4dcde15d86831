"""A sink that keeps what it is given."""

from __future__ import annotations

from titan_train.metrics import StepMetrics


class Recorder:
    def __init__(self) -> None:
        self.seen: list[StepMetrics] = []

    def write(self, metrics: StepMetrics) -> None:
        self.seen.append(metrics)

    def close(self) -> None:
        pass
