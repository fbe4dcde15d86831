"""The README's example runs as printed, and importing the package is light."""

import re
import subprocess
import sys
from pathlib import Path

import titan_data

README = Path(__file__).parents[1] / "README.md"


def test_readme_code_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    scope = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    assert "two ranks go on with the very same tokens" in capsys.readouterr().out


def test_readme_lists_every_public_name():
    text = README.read_text(encoding="utf-8")
    assert [name for name in titan_data.__all__ if f"`{name}`" not in text] == []


def test_import_loads_neither_datasets_nor_siblings():
    code = (
        "import sys, titan_data; "
        "heavy = {'datasets', 'pyarrow', 'titan_model', 'titan_parallel', 'titan_ckpt', 'titan_train'}; "
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
