"""An S3 server on this machine, with outages and stalls on request."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any


class Faults:
    """An application in front of the server: the next reads of objects meet the faults that are asked for.

    Attributes:
        coming: faults of the next reads, in order: a status of HTTP, or "stall" (no answer before `over` is set).
        reads: paths of the objects that were asked for.
        over: ends all stalls.
    """

    def __init__(self, application: Any) -> None:
        self._application = application
        self.coming, self.reads = [], []
        self.over = threading.Event()

    def __call__(self, environ: Any, start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] == "GET" and path.count("/") > 1 and not path.endswith("/"):
            self.reads.append(path)
            fault = self.coming.pop(0) if self.coming else None
            if fault == "stall":
                self.over.wait(60)
            elif fault is not None:
                start_response(f"{fault} Refused", [("Content-Type", "application/xml")])
                return [b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>slow down</Message></Error>"]
        return self._application(environ, start_response)


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, Any]]:
    """Run a server; gives its address and its faults."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        faults.over.set()
        server.shutdown()
        thread.join()
