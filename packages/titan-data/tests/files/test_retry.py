"""Storage that stalls, cuts connections and answers with errors: read through it, or say which file it was."""

import contextlib
import pickle
import random
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_corpus import TEXTS, compress, read_rows, write_bytes, write_jsonl, write_parquet
from data_flat import flat_files
from titan_data import DataError
from titan_data.files.retry import Retry, may_pass, within

RECORDS = [f"{i} {random.Random(i).randbytes(600).hex()}" for i in range(9000)]  # 11 MB: several requests, also packed


class Server:
    """Serves `files`; each GET first takes a fault off `faults`.

    A fault is a status, "cut" (half of the answer), "stall" (no answer before the test ends), or None (a good answer).
    """

    def __init__(self, *, ranges: bool = True) -> None:
        self.files, self.faults, self.requests, self.etag = {}, [], [], '"1"'
        self.ended = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def log_message(self, *args: object) -> None:
                pass

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                if path not in server.files:
                    return self.send_error(404)
                data = server.files[path]
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                part = data
                if server.ranges and wanted:
                    begin, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
                    part = data[begin : end + 1]
                if body:
                    server.requests.append((path, wanted and int(wanted[1])))
                    fault = server.faults.pop(0) if server.faults else None
                    if isinstance(fault, int):
                        return self.send_error(fault)
                    if fault == "stall":
                        server.ended.wait(60)
                        return None
                    if fault == "cut":
                        self.close_connection = True
                else:
                    fault = None
                self.send_response(206 if part is not data else 200)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("ETag", server.etag)
                if part is not data:
                    self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(data)}")
                self.end_headers()
                if body:
                    with contextlib.suppress(ConnectionError):
                        self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
                return None

        self.ranges = ranges
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(params=[True, False], ids=["ranges", "no ranges"])
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    pytest.importorskip("aiohttp")
    server = Server(ranges=request.param)
    yield server
    server.close()


@pytest.fixture
def ranged_server() -> Iterator[Any]:
    pytest.importorskip("aiohttp")
    server = Server()
    yield server
    server.close()


class Waits(list):
    """In place of sleeping."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", RECORDS).read_bytes()


def serve(server: Any, name: str, data: bytes, **options: Any) -> tuple[Any, "Waits"]:
    server.files[f"/{name}"] = data
    waits = Waits()
    retry = Retry(**{"attempts": 4, "sleep": waits, **options})
    source = flat_files(f"{server.url}/{name}?signature=secret", streaming=True, retry=retry)
    server.requests.clear()
    waits.clear()
    return source, waits


@pytest.mark.parametrize("compression", [None, "gz"])
def test_faults_are_read_through(server: Any, jsonl: bytes, compression: str | None) -> None:
    name = f"a.jsonl{'.gz' if compression else ''}"
    source, waits = serve(server, name, compress(jsonl, compression))
    server.faults = [503, None, "cut", 500, "cut", None, 429]
    assert list(source.iterate(0, 0)) == RECORDS
    assert len(waits) >= 3
    waits.clear()
    server.faults = [500, 500, 500]
    assert list(source.iterate(0, 4321)) == RECORDS[4321:]
    assert len(waits) == 3
    assert source.name == name


def test_reading_goes_on_where_it_stood(ranged_server: Any, jsonl: bytes) -> None:
    source, waits = serve(ranged_server, "a.jsonl", jsonl)
    ranged_server.faults = [None, 500]
    assert list(source.iterate(0, 0)) == RECORDS
    assert len(waits) == 1
    begins = [begin for _, begin in ranged_server.requests]
    assert begins[0] == 0
    assert 0 < begins[2] <= begins[1]


def test_giving_up_says_which_file_and_after_how_many_attempts(server: Any, jsonl: bytes) -> None:
    source, waits = serve(server, "a.jsonl", jsonl, delay=1.0, max_delay=3.0)
    server.faults = [500] * 4
    with pytest.raises(
        DataError, match=r"http://127.*/a\.jsonl could not be read at byte 0 after 4 attempts: .*500"
    ) as e:
        list(source.iterate(0, 0))
    assert "secret" not in str(e.value)
    for wait, longest in zip(waits, [1, 2, 3], strict=True):  # doubles up to max_delay, less up to a half at random
        assert longest / 2 <= wait <= longest
    assert list(source.iterate(0, 0)) == RECORDS  # the source is as good as before


def test_a_stall_counts_as_a_failure(ranged_server: Any, jsonl: bytes) -> None:
    source, waits = serve(ranged_server, "a.jsonl", jsonl, stall=1.0)
    ranged_server.faults = [None, "stall"]
    assert list(source.iterate(0, 0)) == RECORDS
    assert len(waits) >= 1
    source, _ = serve(ranged_server, "a.jsonl", jsonl, stall=0.5, attempts=2)
    ranged_server.faults = ["stall"] * 2
    with pytest.raises(DataError, match=r"a\.jsonl could not be read .* after 2 attempts: .*no answer for 0\.5 s"):
        next(source.iterate(0, 0))


def test_what_does_not_pass_is_not_tried_again(ranged_server: Any, jsonl: bytes) -> None:
    source, waits = serve(ranged_server, "a.jsonl", jsonl)
    ranged_server.faults = [403]
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: .*403"):
        list(source.iterate(0, 0))
    del ranged_server.files["/a.jsonl"]
    with pytest.raises(DataError, match=r"a\.jsonl has disappeared"):
        list(source.iterate(0, 0))
    assert waits == []


def test_a_file_that_changes_under_way(ranged_server: Any, jsonl: bytes) -> None:
    source, _ = serve(ranged_server, "a.jsonl", jsonl)
    iterator = source.iterate(0, 0)
    assert next(iterator) == RECORDS[0]
    ranged_server.etag = '"2"'
    ranged_server.faults = ["cut"]
    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was in use"):
        list(iterator)


def test_faults_while_files_are_looked_up(ranged_server: Any, jsonl: bytes) -> None:
    waits = Waits()
    ranged_server.files["/a.jsonl"] = jsonl
    ranged_server.faults = [502, 500]
    source = flat_files(f"{ranged_server.url}/a.jsonl", streaming=True, retry=Retry(sleep=waits))
    assert len(waits) == 2
    assert next(source.iterate(0, 8999)) == RECORDS[8999]
    with pytest.raises(DataError, match=r"file http://.*/b\.jsonl does not exist"):
        flat_files(f"{ranged_server.url}/b.jsonl", streaming=True)


def test_parquet_over_http(ranged_server: Any, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    ranged_server.files["/a.parquet"] = path.read_bytes()
    for streaming in (True, False):
        source = flat_files(f"{ranged_server.url}/a.parquet", streaming=streaming, retry=Retry(sleep=Waits()))
        ranged_server.faults = [500, "cut"]
        assert (list(source.iterate(0, 3)) if streaming else read_rows(source)[3:]) == TEXTS[3:]
        ranged_server.faults = [500] * 99
        with pytest.raises(DataError, match=r"a\.parquet could not be read at byte \d+ after 6 attempts"):
            _ = list(source.iterate(0, 0)) if streaming else pickle.loads(pickle.dumps(source))[0]
        ranged_server.faults = []
        assert source.malformed == 0  # an unreachable network does not make a file malformed


class ShakyFileSystem(MemoryFileSystem):
    """The memory file system, but opening raises what is in `failures`."""

    protocol = "shaky"
    failures: ClassVar[list[Exception]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("shaky://", "memory://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if self.failures:
            raise self.failures.pop()
        return super()._open(path, mode, **options)


def test_any_error_of_a_file_system_is_tried_again(tmp_path: Path) -> None:
    fsspec.register_implementation("shaky", ShakyFileSystem, clobber=True)
    data = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    ShakyFileSystem().pipe_file("/data/a.jsonl", data)
    waits = Waits()
    source = flat_files("shaky://data/*.jsonl", streaming=True, retry=Retry(attempts=3, sleep=waits))
    ShakyFileSystem.failures[:] = [ConnectionResetError("reset"), RuntimeError("some client's own error")]
    assert list(source.iterate(0, 0)) == TEXTS
    assert len(waits) == 2
    ShakyFileSystem.failures[:] = [PermissionError("not yours")]
    with pytest.raises(DataError, match=r"shaky://+data/a\.jsonl cannot be read: PermissionError: not yours"):
        list(source.iterate(0, 0))
    ShakyFileSystem.failures[:] = [ConnectionResetError("reset")] * 3
    with pytest.raises(DataError, match=r"shaky://+data/a\.jsonl could not be read .* after 3 attempts: .*reset"):
        list(source.iterate(0, 0))


def test_a_remote_file_that_disappears_or_changes(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{tmp_path.name}/a.jsonl", b'{"text": "a"}\n')
    source = flat_files(f"memory://{tmp_path.name}/*.jsonl", streaming=True)
    memory.pipe_file(f"/{tmp_path.name}/a.jsonl", b'{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"memory:.*a\.jsonl was changed"):
        list(source.iterate(0, 0))
    memory.rm_file(f"/{tmp_path.name}/a.jsonl")
    with pytest.raises(DataError, match=r"memory:.*a\.jsonl has disappeared"):
        list(source.iterate(0, 0))


def test_settings_of_retrying() -> None:
    with pytest.raises(DataError, match="attempts >= 1"):
        Retry(attempts=0)
    waits = Waits()
    Retry(delay=2.0, max_delay=5.0, sleep=waits).wait(5000)
    assert 2.5 <= waits[0] <= 5.0


def test_which_errors_may_pass() -> None:
    class AnswerError(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    assert all(
        may_pass(error) for error in (OSError(), TimeoutError(), AnswerError(500), AnswerError(429), AnswerError(408))
    )
    assert not any(may_pass(e) for e in (FileNotFoundError(), PermissionError(), AnswerError(404), AnswerError(401)))


def test_within() -> None:
    assert within(5, lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    held = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer for 0\.05 s"):
        within(0.05, held.wait)
    held.set()


def test_local_files_are_tried_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_bytes(tmp_path / "a.jsonl", b'{"text": "a"}\n')
    waits = Waits()
    source = flat_files(path, streaming=True, retry=Retry(sleep=waits))
    local = fsspec.get_filesystem_class("file")
    original, failures = local._open, [OSError(5, "Input/output error")]

    def shaky(self, *args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return original(self, *args, **options)

    monkeypatch.setattr(local, "_open", shaky)
    assert list(source.iterate(0, 0)) == ["a"]
    assert len(waits) == 1


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    waits = Waits()
    iterator = flat_files(path, streaming=True, retry=Retry(sleep=waits)).iterate(0, 0)
    assert next(iterator) == RECORDS[0]
    with path.open("r+b") as file:
        file.truncate(5_000_000)
    with pytest.raises(DataError, match=r"a\.jsonl was changed while it was in use"):
        list(iterator)
