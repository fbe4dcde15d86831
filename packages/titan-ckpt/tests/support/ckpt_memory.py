"""Cases that run in a process with a memory limit; each function returns by how much the process grew."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ckpt_forged import FORGED, refusal, use
from ckpt_hostile import hostile_pickles, make_checkpoint
from titan_ckpt import CheckpointError
from titan_ckpt.convert.dcp.reader import DcpDirectory


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


@contextmanager
def _no_more_than(nbytes: int) -> Iterator[list[int]]:
    grown: list[int] = []
    resident, limit = _status("VmRSS"), _status("VmSize") + nbytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    yield grown
    grown.append(_status("VmHWM") - resident)


def refuse_all(folder: Path) -> int:
    """Refuse all that is forged and hostile, in no more than a gibibyte."""
    valid = make_checkpoint(folder)
    use(valid)  # what is imported late is there by now
    with _no_more_than(1 << 30) as grown:
        for number, (forge, _) in enumerate(FORGED.values()):
            path = Path(shutil.copytree(valid, folder / str(number) / valid.name))
            forge(path)
            assert refusal(path)
        for data in hostile_pickles(folder / "executed").values():
            (folder / ".metadata").write_bytes(data)
            try:
                DcpDirectory(folder)
            except CheckpointError:
                continue
            raise AssertionError("not refused")
    assert not (folder / "executed").exists()
    return grown[0]
