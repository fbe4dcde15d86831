"""Object stores that fail on purpose."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFileSystem


class FailingFileSystem(MemoryFileSystem):
    """fsspec's file system in memory, of which one call can be made to fail."""

    protocol = "failing"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls: ClassVar[int] = 0
    fails_at: ClassVar[int | None] = None

    @classmethod
    def count(cls) -> None:
        cls.calls += 1
        if cls.fails_at is not None and cls.calls > cls.fails_at:
            cls.fails_at = None
            raise OSError("the store does not answer")


def _counted(name: str) -> Callable[..., Any]:
    original = getattr(MemoryFileSystem, name)

    def call(self: FailingFileSystem, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name != "titan-ckpt-lock":
            self.count()
        return original(self, *args, **kwargs)

    return call


for _name in ("ls", "info", "exists", "open", "cat_file", "pipe_file", "rm", "rm_file", "cp_file", "makedirs"):
    setattr(FailingFileSystem, _name, _counted(_name))


class Outage:
    """An application in front of another that refuses everything from some request on, until it is over."""

    def __init__(self, application: Any) -> None:
        self._application = application
        self.requests = 0
        self.begins_at: int | None = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.requests += 1
        if self.begins_at is not None and self.requests > self.begins_at:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>outage</Message></Error>"]
        return self._application(environ, start_response)  # type: ignore[no-any-return]


@contextmanager
def s3_server() -> Iterator[tuple[str, Outage]]:
    """Run an S3 server on this machine; yield its address and its switch."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    outage = Outage(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, outage, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", outage
    server.shutdown()
    thread.join()
