"""What holds for the tests of all packages.

Profiles of hypothesis, chosen by `HYPOTHESIS_PROFILE` or by pytest's `--hypothesis-profile`:

    ci       the default: the same examples on every run; outside the slow set a share of those that a test asks for
    dev      new examples on every run; a failing one is kept in .hypothesis and tried first the next time
    nightly  ten times as many examples, from a seed that moves each day and stands in pytest's first lines
"""

from __future__ import annotations

import os
import random
import sys
import zlib
from collections import Counter
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ("ranks",)

NIGHTLY_FACTOR = 10
DEFAULT_SHARE = 0.4  # of the examples, in tests of the default set: the first ones find nearly all that any find

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("dev", deadline=None)
settings.register_profile("nightly", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the tests in two processes, or in this one when a single file is asked for.

    More than two would not help on few cores, and each may hold fourteen ranks alive.
    """
    one_file = len(config.args) == 1 and config.args[0].partition("::")[0].endswith(".py")
    return 0 if one_file or (os.cpu_count() or 1) == 1 else 2


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed of the day, and keep bytecode in pytest's cache where none is wanted beside the sources.

    These tests start many processes, and each would compile all of torch's Python anew: that doubles their time.
    """
    if _profile(config) == "nightly" and config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = f"{datetime.now(UTC):%Y%m%d}"
    if sys.dont_write_bytecode and getattr(config, "cache", None) is not None:
        sys.dont_write_bytecode = False
        sys.pycache_prefix = str(config.cache.mkdir("bytecode"))
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say how to run a night's examples again."""
    if _profile(config) != "nightly":
        return []
    again = f"HYPOTHESIS_PROFILE=nightly uv run pytest --hypothesis-seed={config.option.hypothesis_seed}"
    return [f"hypothesis: seed of the day; the same examples by: {again}"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take the cases for the night out of the slow set, and choose the numbers of examples: many for a night.

    Those that tests ask for themselves are changed too.
    """
    for item in items:
        if item.get_closest_marker("nightly") is not None:
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
    if (profile := _profile(config)) == "dev":
        return
    changed = set()
    for item in items:
        test = getattr(item, "function", None)
        own = getattr(test, "_hypothesis_internal_use_settings", None)
        if own is None or test in changed or (profile == "ci" and item.get_closest_marker("slow") is not None):
            continue
        changed.add(test)
        factor = NIGHTLY_FACTOR if profile == "nightly" else DEFAULT_SHARE
        examples = max(1, round(factor * own.max_examples))
        test._hypothesis_internal_use_settings = settings(own, max_examples=examples)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the seconds that each package's tests took, added up over the processes that ran them."""
    seconds: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            parts = report.nodeid.split("/")
            seconds[parts[1] if parts[0] == "packages" else parts[0]] += report.duration
    if len(seconds) > 1:
        each = ", ".join(f"{name} {duration:.0f}" for name, duration in sorted(seconds.items()))
        terminalreporter.write_line(f"seconds of tests: {each}")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch, numpy and random from the test's name, so that a test alone draws what it draws among others.

    What is not imported yet is left alone: torch starts from a fixed seed, and tools' tests do without it.
    """
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(value)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(value)
    return value


def _profile(config: pytest.Config) -> str:
    return config.getoption("--hypothesis-profile") or os.environ.get("HYPOTHESIS_PROFILE", "ci")
