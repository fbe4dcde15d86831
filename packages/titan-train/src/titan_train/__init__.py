"""The driver: assembles the other four packages into a training run.

What is exported here loads no torch; `titan_train.running.run` trains.
"""

from titan_train.config import Config
from titan_train.errors import ConfigError, ExitCode, TrainingError
from titan_train.settings import Settings, load, preset_names

__all__ = ["Config", "ConfigError", "ExitCode", "Settings", "TrainingError", "load", "preset_names"]
