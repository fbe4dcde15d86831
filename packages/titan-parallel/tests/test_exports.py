"""The package's names are imported when they are first used."""

from __future__ import annotations

import subprocess
import sys

import titan_parallel


def test_every_exported_name_exists() -> None:
    assert set(titan_parallel._MODULES) == set(titan_parallel.__all__)
    for name in titan_parallel.__all__:
        assert getattr(titan_parallel, name) is not None
    assert set(titan_parallel.__all__) <= set(dir(titan_parallel))


def test_options_are_read_without_importing_torch() -> None:
    code = "import sys; from titan_parallel import Degrees, ParallelOptions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
