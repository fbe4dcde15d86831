"""Writes and reads that pass the kernel's cache by, and all that can keep them from it."""

import ctypes
import errno
import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ckpt_cases
from ckpt_states import Held
from ranks import Ranks
from titan_ckpt import Checkpointer, CheckpointError, open_checkpoint, verify
from titan_ckpt.format.checksum import PIECE_BYTES

PAGE = mmap.PAGESIZE
# Three sizes in bytes: neither the pieces of 8 MiB nor the file's end are page-aligned, and small tensors are between.
DTYPES = {"a": torch.float32, "b": torch.bfloat16, "c": torch.uint8, "d": torch.float32, "e": torch.uint8}
LENGTHS = {"a": 2_700_001, "b": 3, "c": 9, "d": 2_200_001, "e": 1_100_003}


def make(lengths: dict[str, int]) -> Held:
    made = {name: torch.arange(length).remainder_(251).to(DTYPES[name]) for name, length in lengths.items()}
    return Held(**made)


def blank(lengths: dict[str, int]) -> Held:
    return Held(**{name: torch.zeros(length, dtype=DTYPES[name]) for name, length in lengths.items()})


def equal(left: Held, right: Held) -> bool:
    return all(torch.equal(tensor, right.state[name]) for name, tensor in left.state.items())


def save(folder: Path, lengths: dict[str, int], mode: Any = False) -> Path:
    """Save tensors of these lengths; return the one file of tensors that comes of it."""
    ckpt = Checkpointer(folder, asynchronous=mode)
    ckpt.save(1, {"model": make(lengths)})
    ckpt.close()
    (path,) = folder.glob("step-*/*.safetensors")
    return path


def load(folder: Path, lengths: dict[str, int]) -> None:
    """Load, and see that it is what was saved."""
    got = blank(lengths)
    assert Checkpointer(folder).load({"model": got}) is not None
    assert equal(make(lengths), got)


class Direct:
    """Watches what is done to files that are open for direct access, and can refuse it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, int]] = []
        self.refuse = ""
        self._handles: set[int] = set()
        self._original = {name: getattr(os, name) for name in ("open", "close", "pwrite", "preadv")}
        for name in ("pwrite", "preadv"):
            monkeypatch.setattr(os, name, lambda *args, name=name: self._move(name, *args))
        monkeypatch.setattr(os, "open", self._open)
        monkeypatch.setattr(os, "close", self._close)

    def count(self, name: str) -> int:
        """Tell how many bytes went so."""
        return sum(nbytes for what, nbytes in self.done if what == name)

    def _open(self, path: Any, flags: int, *args: Any) -> int:
        self._may("open", bool(flags & os.O_DIRECT))
        handle: int = self._original["open"](path, flags, *args)
        if flags & os.O_DIRECT:
            self._handles.add(handle)
        return handle

    def _close(self, handle: int) -> None:
        self._handles.discard(handle)
        self._original["close"](handle)

    def _move(self, name: str, handle: int, *args: Any) -> int:
        self._may(name, handle in self._handles)
        done: int = self._original[name](handle, *args)
        if handle in self._handles:
            self.done.append((name, done))
        return done

    def _may(self, name: str, direct: bool) -> None:
        if direct and name == self.refuse:
            self.done.append((f"{name} refused", 1))
            raise OSError(errno.EINVAL, "Invalid argument")


@pytest.fixture
def direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Direct:
    path = tmp_path / "direct"
    path.write_bytes(bytes(PAGE))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the file system of temporary folders has no direct access")
    forget(path)
    if pages_in_cache(path):
        pytest.skip("the file system of temporary folders is the kernel's memory itself")
    return Direct(monkeypatch)


@pytest.mark.parametrize("mode", [False, True])
def test_what_is_written_and_read_stays_out_of_the_kernels_memory(tmp_path: Path, direct: Direct, mode: Any) -> None:
    path = save(tmp_path, LENGTHS, mode)
    # A synchronous save uses direct I/O only for tensors that happen to be page-aligned.
    if mode:
        assert pages_in_cache(path) < 100
    forget(path)
    assert pages_in_cache(path) == 0
    load(tmp_path, LENGTHS)
    assert direct.count("preadv") > path.stat().st_size - (64 << 10)
    assert pages_in_cache(path) < 100
    load(tmp_path, LENGTHS)  # nothing of the load before is taken for being remembered
    assert direct.count("preadv") > 2 * (path.stat().st_size - (64 << 10))


def test_a_check_leaves_the_kernels_memory_as_it_is(tmp_path: Path, direct: Direct) -> None:
    path = save(tmp_path, LENGTHS)
    forget(path)
    assert verify(path.parent, "checksum") == []
    assert direct.count("preadv") > path.stat().st_size - (64 << 10)
    assert pages_in_cache(path) < 100


def test_what_the_kernel_remembers_is_read_from_its_memory(tmp_path: Path, direct: Direct) -> None:
    path = save(tmp_path, LENGTHS)
    path.read_bytes()
    assert pages_in_cache(path) == -(-path.stat().st_size // PAGE)
    load(tmp_path, LENGTHS)
    assert direct.count("preadv") == 0


@pytest.mark.parametrize("refuse", ["open", "pwrite", "preadv"])
def test_without_direct_access(tmp_path: Path, direct: Direct, refuse: str) -> None:
    direct.refuse = refuse
    lengths = {"a": 12_000_001}  # more pieces than threads
    path = save(tmp_path, lengths, mode=True)
    forget(path)
    load(tmp_path, lengths)
    refused, read = direct.count(f"{refuse} refused"), direct.count("preadv")
    if refuse == "pwrite":
        assert refused == 1  # which is enough to know
        assert read > 0
    else:
        assert 1 <= refused - (refuse == "open") <= 4  # threads may meet there
        assert read == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_of_any_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    near_pages = st.builds(lambda pages, off: max(1, pages * PAGE + off), st.integers(0, 700), st.integers(-2, 2))
    lengths = data.draw(st.dictionaries(st.sampled_from("abcde"), near_pages | st.integers(1, 2_200_000), min_size=1))
    folder = tmp_path_factory.mktemp("any")
    path = save(folder, lengths)
    forget(path)
    load(folder, lengths)
    name = data.draw(st.sampled_from(sorted(lengths)))
    start = data.draw(st.integers(0, lengths[name] - 1))
    length = data.draw(st.integers(0, lengths[name] - start))
    with open_checkpoint(str(path.parent)) as opened:
        part = opened.read_slice(f"model/{name}", (start,), (length,))
    assert torch.equal(part, make(lengths).state[name][start : start + length])


def test_a_file_that_is_cut_short_while_it_is_open(tmp_path: Path) -> None:
    path = save(tmp_path, LENGTHS)
    with open_checkpoint(str(path.parent)) as opened:
        assert opened.read("model/c").tolist() == list(range(9))
        os.truncate(path, PAGE + 100)
        with pytest.raises(CheckpointError, match=r"cannot be read \(the file ends at byte 4196\), needed for model/a"):
            opened.read("model/a")


def test_a_checkpoint_that_is_deleted_while_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, LENGTHS)
    forget(path)
    with open_checkpoint(str(path.parent)) as opened:
        opened.read("model/c")
        shutil.rmtree(path.parent)
        assert torch.equal(opened.read("model/a"), make(LENGTHS).state["a"])


@pytest.mark.usefixtures("direct")
def test_ranks_that_want_the_same_read_it_from_the_disk_once(ranks2: Ranks, tmp_path: Path) -> None:
    length = 2 * PIECE_BYTES // 4  # so that no piece belongs to both when it is sharded
    path = save(tmp_path, {"a": length})
    forget(path)
    assert ranks2.run(ckpt_cases.load_one_tensor, tmp_path, length, "sharded") == [PIECE_BYTES, PIECE_BYTES]
    apart = ranks2.run(ckpt_cases.load_one_tensor, tmp_path, length, "replicated", 2)
    assert apart == [2 * PIECE_BYTES, 2 * PIECE_BYTES]  # machines that share no memory
    assert pages_in_cache(path) < 100
    assert ranks2.run(ckpt_cases.load_one_tensor, tmp_path, length, "replicated") == [0, 0]
    assert pages_in_cache(path) * PAGE > path.stat().st_size - (1 << 20)


def forget(path: Path) -> None:
    """Have the kernel drop a file from its memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pages_in_cache(path: Path) -> int:
    """Return how many of a file's pages the kernel has in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as memory:
        there = (ctypes.c_ubyte * -(-size // PAGE))()
        start = ctypes.c_char.from_buffer(memory)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), there) == 0
        del start
        return sum(page & 1 for page in there)
