"""What the page's server meets: a server of completions on loopback, with a log of temperatures."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from autodeco_fast.serving.vllm_log import TemperatureLog


def chunk(text: str, tokens: list[str], reason: str | None = None) -> dict:
    """An event of vLLM's stream."""
    logprobs = {"tokens": tokens, "token_logprobs": [-0.1] * len(tokens)}
    return {"choices": [{"text": text, "logprobs": logprobs, "finish_reason": reason}]}


class FakeVllm:
    """Answers with `chunks`: each is an event of the stream, bytes, or a `threading.Event` that is
    waited for. A token of a request that asks for the log gets its line first; `temperature` says
    which, None writes none."""

    def __init__(self, log: Path, *, status: int = 200):
        self.chunks, self.status = [], status
        self.temperature = lambda index: (index + 1) / 10
        self.requests: list[dict] = []
        self.left = threading.Event()  # a client closed its connection before the end
        self._log = TemperatureLog(str(log))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                self._answer(handler)

            def log_message(handler, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_port

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append({"path": handler.path, **asked})
        handler.send_response(self.status)
        handler.end_headers()
        key, count = asked["vllm_xargs"].get("autodeco_log"), 0
        for each in self.chunks:
            if isinstance(each, threading.Event):
                handler.connection.settimeout(20)
                if not handler.connection.recv(1):  # until the client leaves
                    self.left.set()
                return
            if isinstance(each, dict) and "choices" in each:
                for _ in each["choices"][0]["logprobs"]["tokens"]:
                    T = self.temperature(count)
                    if key is not None and T is not None:
                        self._log.write([("another", count, 9.0), (key, count, T)])
                    count += 1
            data = each if isinstance(each, bytes) else f"data: {json.dumps(each)}\n\n".encode()
            handler.wfile.write(data)

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
