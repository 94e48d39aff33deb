"""`python -m autodeco_fast.demo.serve`, with a package that only looks like vLLM."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from autodeco_fast.demo import smollm2
from autodeco_fast.demo.serve.__main__ import main
from tests.commands import ROOT

DIES = """
import sys
print("loading", *sys.argv[1:])
print("RuntimeError: no memory", file=sys.stderr)
sys.exit(3)
"""
SERVES = """
import http.server, pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[0]).with_name("pids").write_text(f"{os.getpid()} {child.pid}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a vLLM of some source, and a model that needs no conversion; returns its module."""
    module = tmp_path / "site/vllm/entrypoints/openai/api_server.py"
    module.parent.mkdir(parents=True)
    model = tmp_path / "cache/autodeco_fast" / smollm2.cache_folder().name
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "site/vllm/__init__.py").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "vllm", raising=False)

    def write(source: str) -> Path:
        module.write_text("import os\n" + source)
        return module

    return write


def left(folder: Path) -> list[Path]:
    return list(folder.glob("autodeco-serve-*"))


def test_a_vllm_that_does_not_start_shows_its_last_lines(fake, tmp_path, capfd):
    fake(DIES)
    assert main(["--port", "0", "--api-port", "0"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "RuntimeError: no memory\n" in err
    assert err.endswith("error: vLLM ended with code 3\n")
    (words,) = re.findall("^loading (.*)$", err, re.M)
    assert f"--additional-config.autodeco_head {smollm2.HEAD} " in words
    assert "--host 127.0.0.1 " in words
    assert "--generation-config vllm " in words
    assert not left(tmp_path)


def test_what_the_user_can_mend_is_one_line(fake, monkeypatch, capfd):
    fake(DIES)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name in ("--port", "--api-port"):
            others = {"--port": "0", "--api-port": "0", name: port}
            assert main([word for pair in others.items() for word in pair]) == 2
            err = capfd.readouterr().err
            assert err.startswith(f"error: {name} {port} cannot be used: ")
            assert err.count("\n") == 1
    assert main(["--port", "65536"]) == 2
    assert capfd.readouterr().err == "error: --port must be in [0, 65535], got 65536\n"
    assert main(["--port", "9", "--api-port", "9"]) == 2
    assert capfd.readouterr().err == "error: --port and --api-port must differ, got 9 for both\n"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["--port", "0", "--api-port", "0"]) == 2
    assert re.fullmatch(r"error: vLLM is not .*make serve.*\n", capfd.readouterr().err)


def is_running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def ends(pid: int) -> bool:
    """Whether a process that was killed is gone, in a moment."""
    end = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)


def test_ctrl_c_stops_everything(fake, tmp_path):
    module = fake(SERVES)
    words = ["-m", "autodeco_fast.demo.serve", "--port", "0", "--api-port", "0"]
    process = subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert b"<!doctype html>" in answer.read()
        pids = [int(pid) for pid in module.with_name("pids").read_text().split()]
        assert all(map(is_running, pids))
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)  # an impatient user
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert (out, len(err.splitlines())) == ("", 1)
    assert all(map(ends, pids))
    assert not left(tmp_path)


def test_a_vllm_that_is_killed_ends_it(fake, tmp_path, capfd):
    pids = fake(SERVES).with_name("pids")

    def kill() -> None:
        end = time.monotonic() + 60
        while "Ctrl-C stops" not in (said := capfd.readouterr().out) and time.monotonic() < end:
            time.sleep(0.1)
        shown.append(said)
        os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)

    shown = []
    killer = threading.Thread(target=kill)
    killer.start()
    assert main(["--port", "0", "--api-port", "0"]) == 1
    killer.join()
    assert "side by side: http://127.0.0.1:" in shown[0]
    assert capfd.readouterr().err.endswith("error: vLLM ended with code -9\n")
    assert ends(int(pids.read_text().split()[1]))
    assert not left(tmp_path)
