"""Every setting of a run, typed and frozen: one module for the sections of each concern.

`titan_train.settings.load` fills a `Config` from defaults, file and command line; `titan_train.check` and
`titan_train.assembly` use it. Nothing here imports torch, so that a mistake is reported at once.
"""

from __future__ import annotations

from titan_train.config.checkpoint import CheckpointSection
from titan_train.config.data import DataSection
from titan_train.config.model import ModelSection, MoESection, RopeSection
from titan_train.config.parallel import ParallelSection
from titan_train.config.run import MetricsSection, RunSection, SampleSection
from titan_train.config.section import Section
from titan_train.config.training import OptimizerSection, ScheduleSection, TrainingSection

__all__ = ["Config"]


class Config(Section):
    """All settings of a run."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    rope: RopeSection = RopeSection()
    moe: MoESection = MoESection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    metrics: MetricsSection = MetricsSection()
    sample: SampleSection = SampleSection()
