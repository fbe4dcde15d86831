"""Exit codes, and the errors that end a run with one message instead of a traceback."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """How `titan-train` ends. A second signal ends it at once with 128 + the signal's number."""

    DONE = 0
    FAILED = 1
    BAD_CONFIG = 2
    STOPPED = 75  # saved after a signal: the same command goes on from there (EX_TEMPFAIL of sysexits.h)


class ConfigError(ValueError):
    """A setting that cannot work: what, where it was set, what to set instead."""


class TrainingError(RuntimeError):
    """A run that cannot go on, for a reason that a person has to look at."""
