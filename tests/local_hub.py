"""A hub on loopback for tests: files with ranges, and every way in which a server can misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qsl

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Serves `files` by path; the attributes say how it misbehaves. Use as a context manager."""

    def __init__(self, files: dict[str, bytes] | None = None) -> None:
        self.files = dict(files or {})
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.status = 0  # answers everything with this status
        self.cut_after = 0  # breaks off each answer after so many bytes
        self.cuts_left = 10**9
        self.ignores_range = False
        self.stall_after = 0  # sends so many bytes and then nothing more
        self.delay = 0.0  # seconds before each answer
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        self.headers: list[dict[str, str]] = []
        self._closed = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LocalHub:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def downloads(self) -> list[str]:
        """The ranges of all requests for content; probes are left out."""
        return [
            wanted for verb, _, wanted in self.requests if verb == "GET" and wanted != "bytes=0-0"
        ]

    def add_repository(self, name: str, files: dict[str, bytes]) -> None:
        """Serve a whole repository the way Hugging Face does."""
        self.repositories[name] = files
        for path, content in files.items():
            for revision in ("main", COMMIT):
                self.files[f"/{name}/resolve/{revision}/{path}"] = content

    def add_modelscope_repository(self, name: str, files: dict[str, bytes]) -> None:
        """Serve a whole repository the way ModelScope does."""
        api = f"/api/v1/models/{name}/repo"
        entries = [
            {
                "Path": path,
                "Name": path,
                "Type": "blob",
                "Size": len(content),
                "Sha256": hashlib.sha256(content).hexdigest(),
                "Revision": COMMIT,
            }
            for path, content in files.items()
        ]
        listing = {"Code": 200, "Success": True, "Data": {"Files": entries}}
        self.files[f"{api}/files"] = json.dumps(listing).encode()
        for path, content in files.items():
            self.files[f"{api}?FilePath={path}"] = content
            self.files[f"/models/{name}/resolve/master/{path}"] = content

    def _api(self, path: str) -> bytes | None:
        for name, files in self.repositories.items():
            if re.fullmatch(rf"/api/models/{name}(/revision/.*)?", path):
                siblings = [{"rfilename": file} for file in files]
                return json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
            if path.startswith(f"/api/models/{name}/tree/"):
                entries = [
                    {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}
                    for file, content in files.items()
                ]
                return json.dumps(entries).encode()
        return None

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle()

            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, with_body: bool) -> None:
                path, _, query = self.path.partition("?")
                for name, value in parse_qsl(query):
                    path += f"?FilePath={value}" if name == "FilePath" else ""
                wanted = self.headers.get("Range", "")
                hub.requests.append((self.command, path, wanted))
                hub.headers.append(dict(self.headers))
                time.sleep(hub.delay)
                body = hub._api(path) or hub.files.get(path)
                status = hub.status or (404 if body is None else 200)
                if status != 200 or body is None:
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start, end = 0, len(body)
                match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
                if match and not hub.ignores_range:
                    start = int(match[1])
                    end = min(end, int(match[2]) + 1) if match[2] else end
                    status = 206 if start < len(body) else 416
                self.send_response(status)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
                self.send_header("ETag", f'"{_etag(body)}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(max(end - start, 0)))
                self.end_headers()
                if with_body and status != 416:
                    self._send(body[start:end])

            def _send(self, body: bytes) -> None:
                is_probe = len(body) <= 1
                with contextlib.suppress(OSError):
                    if hub.stall_after and not is_probe:
                        self.wfile.write(body[: hub.stall_after])
                        self.wfile.flush()
                        hub._closed.wait(30)
                        self.close_connection = True
                    elif hub.cut_after and hub.cuts_left and not is_probe:
                        hub.cuts_left -= 1
                        self.wfile.write(body[: hub.cut_after])
                        self.close_connection = True
                    else:
                        self.wfile.write(body)

        return Handler


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class SilentServer:
    """Accepts connections and never says a word. Use as a context manager.

    Attributes:
        most_open: How many connections were open at the same time.
    """

    def __enter__(self) -> SilentServer:
        self.most_open = 0
        self._open: list[socket.socket] = []
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=16)
        self._socket.settimeout(0.05)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()
        return self

    def _listen(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                self._open.append(self._socket.accept()[0])
            self._open = [connection for connection in self._open if not self._hung_up(connection)]
            self.most_open = max(self.most_open, len(self._open))

    @staticmethod
    def _hung_up(connection: socket.socket) -> bool:
        """Tell whether the client closed a connection, and close our side of it then."""
        connection.setblocking(False)
        try:
            gone = connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            gone = True
        if gone:
            connection.close()
        return gone

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        for connection in self._open:
            connection.close()
        self._socket.close()
