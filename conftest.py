"""What holds for the tests of all packages."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

pytest_plugins = ("ranks",)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run the tests in two processes, or in this one when a single file is asked for.

    More than two would not help on few cores, and each may hold fourteen ranks alive.
    """
    one_file = len(config.args) == 1 and config.args[0].partition("::")[0].endswith(".py")
    return 0 if one_file or (os.cpu_count() or 1) == 1 else 2


def pytest_configure(config: pytest.Config) -> None:
    """Keep bytecode in pytest's cache where the environment wants none beside the sources.

    These tests start many processes, and each would compile all of torch's Python anew: that doubles their time.
    """
    if sys.dont_write_bytecode and getattr(config, "cache", None) is not None:
        sys.dont_write_bytecode = False
        sys.pycache_prefix = str(config.cache.mkdir("bytecode"))
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
