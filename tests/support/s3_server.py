"""An S3 server on a folder, which can be stopped, and a proxy in front of it that can misbehave."""

import http.client
import socket
import subprocess
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

KEY, SECRET = "testkey1", "testsecret1"


class S3Server:
    """rclone's S3 server; the folders right in `folder` are the buckets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        rclone = Path(sysconfig.get_path("scripts")) / "rclone"
        command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{self.port}"]
        command += ["--auth-key", f"{KEY},{SECRET}", "--dir-cache-time", "0", self._folder]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Proxy:
    """Passes requests on to a server, unless told otherwise, and counts what it serves."""

    def __init__(self, port: int) -> None:
        self._lock = Lock()
        self._port = port
        self.gets: Counter[str] = Counter()
        """GET requests for each path that were answered whole."""
        self.sent_bytes: Counter[str] = Counter()
        """Bytes of bodies sent for each path."""
        self.status: Callable[[str], int | None] = lambda path: None
        """A status to answer instead of passing the request on."""
        self.cut: Callable[[str], int | None] = lambda path: None
        """Bytes of a body after which to hang up."""
        self.on_get: Callable[[str], None] = lambda path: None
        """Called before a GET is passed on."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fetch(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Ask the server behind; returns its answer and the body, or raises OSError."""
        with closing(http.client.HTTPConnection("127.0.0.1", self._port)) as server:
            server.request(method, path, headers=dict(headers))
            response = server.getresponse()
            return response, response.read()

    def sent(self, path: str, size: int, *, whole: bool) -> None:
        """Count a body that was sent in answer to a GET."""
        with self._lock:
            self.sent_bytes[path] += size
            self.gets[path] += whole

    @contextmanager
    def serving(self) -> Generator[None]:
        thread = Thread(target=self._server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection to a proxy."""

    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: Proxy, *connection: Any) -> None:
        self._proxy = proxy
        super().__init__(*connection)

    def do_HEAD(self) -> None:
        self._answer(gets=False)

    def do_GET(self) -> None:
        self._proxy.on_get(self.path)
        self._answer(gets=True)

    def _answer(self, *, gets: bool) -> None:
        status = self._proxy.status(self.path)
        if status is not None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        try:
            response, body = self._proxy.fetch(self.command, self.path, dict(self.headers))
        except OSError:
            self.close_connection = True
            return
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        if gets and "Content-Length" not in response.headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        part = body[: self._proxy.cut(self.path)] if gets else body
        self.wfile.write(part)
        self.close_connection = len(part) < len(body)
        if gets:
            self._proxy.sent(self.path, len(part), whole=len(part) == len(body))

    def log_message(self, format: str, *args: object) -> None:
        pass
