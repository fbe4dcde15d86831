"""The README's scripts run as described, and its tables list what is public."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import parallel_table
import titan_parallel
from titan_parallel import Degrees, Float8Options, ParallelOptions, ParallelPlan, PipelineOptions
from titan_parallel.options import ContextKind
from titan_parallel.plan import TensorStyle

README = (Path(__file__).parents[1] / "README.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SAYS = [
    r"^loss (\d\.\d+) -> (\d\.\d+)$",
    r"tp=2, pp=1\): loss \d\.\d+, as in one process\n.*tp=1, pp=2\): loss .* one process$",
]
RANKS = [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "ranks", "says"), list(zip(SCRIPTS, RANKS, SAYS, strict=True)), ids=["diffusion transformer", "llama"]
)
def test_scripts(tmp_path: Path, script: str, ranks: int, says: str) -> None:
    if "transformers import" in script:
        pytest.importorskip("transformers")
    path = tmp_path / "example.py"
    path.write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.search(says, done.stdout, re.MULTILINE)
    assert found, done.stdout
    if found.groups():
        assert float(found[2]) < float(found[1]) / 2


def test_tables_are_up_to_date() -> None:
    assert parallel_table.written(README) == README, "run packages/titan-parallel/tests/support/parallel_table.py"


def test_tables() -> None:
    cells = re.findall(r"^\| (`[^|]+) \|", README, flags=re.MULTILINE)
    listed = [name for cell in cells for name in re.findall(r"`([A-Za-z_0-9]+)[^`]*`", cell)]
    entries, degrees = ParallelPlan.__annotations__, Degrees.__dataclass_fields__
    options = [
        field for kind in (ParallelOptions, Float8Options, PipelineOptions) for field in kind.__dataclass_fields__
    ]
    words = [*entries, *TensorStyle.__args__, *degrees, *options, *titan_parallel.__all__]
    assert sorted(listed) == sorted([*words, *ContextKind.__args__])
