"""HTTP between the page and vLLM, on loopback.

    GET  /, /page.css, /page.js   the page
    GET  /about                   what it shows of the server, and what it starts from
    POST /complete                one completion (`completions.Asked`), a line of JSON an event

An event is the request as vLLM got it, a token, the end, or `{"error": …}`. What is wrong with a
request comes as status 400 with such a line, vLLM's refusals and failures as the last event. Pages
of other origins get nothing: hosts, origins and content types are checked.
"""

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from autodeco_fast.demo.serve.completions import Asked, Temperatures, events
from autodeco_fast.errors import line

HOST = "127.0.0.1"
_FOLDER = Path(__file__).parent / "page"
_FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
_LARGEST = 1 << 20  # bytes of a request
_PATIENCE = 60  # seconds for a request to come in
_NAMES = (HOST, "localhost", "::1")  # of this machine; other ports are forwarded ones
_POLICY = "default-src 'none'; img-src data:; " + "; ".join(
    f"{each}-src 'self'" for each in ("script", "style", "connect")
)


class PageServer(ThreadingHTTPServer):
    """Serves the page until `shutdown`.

    Args:
        port: of the page on loopback, 0 for a free one.
        api_port: of vLLM on loopback.
        model: as vLLM calls it.
        log: the file that vLLM writes temperatures to.
        about: what the page shows and starts from.

    Raises:
        OSError: if the port is taken.
    """

    def __init__(self, port: int, *, api_port: int, model: str, log: Path, about: dict):
        self.api_port, self.model, self.log = api_port, model, log
        self.about = json.dumps(about).encode()
        self.files = {
            path: ((_FOLDER / name).read_bytes(), kind) for path, (name, kind) in _FILES.items()
        }
        super().__init__((HOST, port), _Handler)
        self.url = f"http://{HOST}:{self.server_port}/"

    def completion(self, asked: Asked, client: socket.socket) -> Iterator[dict]:
        """The events of a completion. vLLM is left as soon as the client leaves.

        Raises:
            ValueError: with what is wrong with vLLM or its answer.
        """
        body = asked.body(self.model)
        yield {"request": body}
        key = body["vllm_xargs"].get("autodeco_log")
        temperatures = asked.temperature if key is None else Temperatures(self.log, key)
        connection = HTTPConnection(HOST, self.api_port)
        try:
            with closing(connection):
                connection.connect()
                with _ends_with(client, connection.sock):
                    headers = {"Content-Type": "application/json"}
                    connection.request("POST", "/v1/completions", json.dumps(body), headers)
                    with connection.getresponse() as answer:
                        yield from events(answer, temperatures)
        except (OSError, HTTPException) as error:
            where = f"http://{HOST}:{self.api_port}"
            raise ValueError(f"vLLM does not answer at {where}: {line(error)}") from None


@contextmanager
def _ends_with(client: socket.socket, upstream: socket.socket) -> Iterator[None]:
    """While it lasts, the end of one connection shuts the other down."""

    def watch() -> None:
        try:
            client.recv(1, socket.MSG_PEEK)  # nothing more comes: returns at the end
            upstream.shutdown(socket.SHUT_RDWR)
        except OSError:  # either of them is closed already
            pass

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        with suppress(OSError):  # it has left
            client.shutdown(socket.SHUT_RD)
        watcher.join()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = _PATIENCE

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self._is_ours():
            self._say(403, "this page is for this machine's browser")
        elif path == "/about":
            self._answer(200, self.server.about, "application/json")
        elif path in self.server.files:
            self._answer(200, *self.server.files[path])
        else:
            self._say(404, "there is no such page")

    def do_POST(self) -> None:
        if not self._is_ours() or self.headers.get_content_type() != "application/json":
            return self._say(403, "requests must be JSON and come from the page itself")
        if urlsplit(self.path).path != "/complete":
            return self._say(404, "there is no such page")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > _LARGEST:
            return self._say(413, f"a request must have a length of at most {_LARGEST} bytes")
        try:
            asked = Asked.read(self.rfile.read(int(length)))
        except ValueError as error:
            return self._say(400, line(error))
        self.connection.settimeout(None)
        self._head(200, "application/x-ndjson")
        try:
            with closing(self.server.completion(asked, self.connection)) as found:
                for event in found:
                    self._event(event)
        except ValueError as error:
            self._event({"error": line(error)})

    def _is_ours(self) -> bool:
        """Whether a request comes from a page of this server: not from another site's, nor one
        whose name was made to point here."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name in _NAMES and origin in (None, f"http://{host}")

    def _event(self, event: dict) -> None:
        self.wfile.write(json.dumps(event).encode() + b"\n")

    def _say(self, status: int, complaint: str) -> None:
        self._answer(status, json.dumps({"error": complaint}).encode(), "application/json")

    def _answer(self, status: int, data: bytes, kind: str) -> None:
        self._head(status, kind, length=len(data))
        self.wfile.write(data)

    def _head(self, status: int, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _POLICY)
        self.end_headers()

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the browser left
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """The terminal is the user's."""
