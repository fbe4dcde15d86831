"""A small HTTP server that behaves like the Hugging Face Hub, with its refusals and cut connections."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What the server has and does.

    Attributes:
        files: (repository, path) to contents; names of datasets' repositories begin with "datasets/".
        gated: repositories for accounts with access only.
        tokens: accounts' tokens and whether they have access to what is gated.
        cut_after: bytes after which the connection of each of the next `cuts` downloads is cut.
        requests: (method, path, Range header) of each request.
    """

    def __init__(self) -> None:
        self.files, self.gated, self.tokens = {}, set(), {}
        self.cut_after, self.cuts = None, 0
        self.requests = []
        self.address = ""


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Run a server; gives the `Hub` that steers it."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            parts = self.path.split("?")[0].strip("/").split("/")
            api = parts[:2] == ["api", "datasets"]
            if api:
                parts = [*parts[1:4], *(parts[4:] or ["revision", "main"])]
            elif "resolve" not in parts:
                return self.refuse(404, None, "Not found")
            kind = [parts.pop(0)] if parts[0] == "datasets" else []
            owner, name, what, revision, *path = parts
            repository, path = "/".join([*kind, owner, name]), "/".join(path)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            if token and token not in hub.tokens:
                return self.refuse(401, None, "Invalid credentials in Authorization header")
            if repository not in {known for known, _ in hub.files}:
                return self.refuse(401 if not token else 404, "RepoNotFound", "Repository not found")
            if repository in hub.gated and not hub.tokens.get(token):
                return self.refuse(403 if token else 401, "GatedRepo", "Access to model is restricted")
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound", "Invalid rev id")
            if api:
                return self.send_json(self.describe(repository) if what == "revision" else self.tree(repository, path))
            if (repository, path) not in hub.files:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            return self.send_file(hub.files[repository, path], body)

        def describe(self, repository: str) -> dict[str, Any]:
            files = [{"rfilename": path} for known, path in hub.files if known == repository]
            return {"id": repository.partition("/")[2], "sha": COMMIT, "siblings": files, "tags": [], "gated": False}

        def tree(self, repository: str, folder: str) -> list[Any]:
            """List a folder, not what is below its folders."""
            entries = {}
            for (known, path), data in hub.files.items():
                if known == repository and path.startswith(folder + "/" * bool(folder)):
                    below = path[len(folder) :].strip("/").partition("/")
                    inside = "/".join([folder] * bool(folder) + [below[0]])
                    entries[inside] = {"path": inside, "oid": hashlib.sha1(data).hexdigest()}
                    entries[inside] |= {"type": "directory"} if below[1] else {"type": "file", "size": len(data)}
            return [*entries.values()]

        def send_json(self, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def refuse(self, status: int, code: str | None, message: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_file(self, data: bytes, body: bool) -> None:
            start = 0
            if (wanted := self.headers.get("Range")) and not wanted.startswith("bytes=0-0"):
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if not body:
                return
            if hub.cuts > 0 and start + hub.cut_after < len(data):
                hub.cuts -= 1
                self.wfile.write(data[start : start + hub.cut_after])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.wfile.write(data[start:])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
