"""Cases that run in a process with a memory limit; each function returns by how much the process grew."""

import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ckpt_forged import FORGED, refusal, use
from ckpt_hostile import greedy_pickles, hostile_pickles, make_checkpoint, torch_archive
from titan_ckpt import CheckpointError, open_source
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


def write_greedy(folder: Path, kind: str, data: bytes) -> Path:
    """Write a pickle as a file of torch.save, as DCP's `.metadata`, or as a value of a DCP directory."""
    if kind == "torch":
        (folder / "x.pt").write_bytes(torch_archive(data))
        return folder / "x.pt"
    if kind == "dcp":
        (folder / ".metadata").write_bytes(data)
        return folder
    entry = torch_archive(data)
    (folder / "__0_0.distcp").write_bytes(entry)
    metadata = dcp_metadata.Metadata(
        {"value": dcp_metadata.BytesStorageMetadata()},
        storage_data={dcp_metadata.MetadataIndex("value"): _StorageInfo("__0_0.distcp", 0, len(entry))},
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def refused(path: Path) -> str:
    """Return why a file is refused, or why the one value in it is left out."""
    try:
        source = open_source(path)
    except CheckpointError as error:
        return str(error)
    return str(getattr(source, "left_out", {}).get("value", ""))


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
        for data in greedy_pickles().values():
            for kind in ("torch", "dcp", "dcp value"):
                assert refused(write_greedy(folder, kind, data))
    assert not (folder / "executed").exists()
    return grown[0]
