"""Exit codes, and the errors that end a run with one message instead of a traceback."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `titan-train`. A second signal ends it at once with 128 + the signal's number."""

    DONE = 0
    FAILED = 1
    BAD_CONFIG = 2
    STOPPED = 75  # saved after a signal: the same command resumes (EX_TEMPFAIL of sysexits.h)


class ConfigError(ValueError):
    """An invalid setting. The message names the setting, where it was set, and what to set instead."""


class TrainingError(RuntimeError):
    """A run cannot continue, for a reason that needs a person's attention."""
