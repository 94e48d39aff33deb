"""`python -m autodeco_fast.demo.serve`: vLLM with SmolLM2 and its head, and the page beside it.

Runs until Ctrl-C. If vLLM does not start, or ends, its last lines are shown and the exit code is 1;
what the user can mend is one line and exit code 2.
"""

import argparse
import importlib.util
import json
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

from autodeco_fast import policies
from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.demo import smollm2
from autodeco_fast.demo.records import TEST
from autodeco_fast.demo.serve.engine import Engine
from autodeco_fast.demo.serve.page_server import HOST, PageServer
from autodeco_fast.errors import USERS, line
from autodeco_fast.training.shading import HOTTEST, ORANGE, opacity

PORT, API_PORT = 8080, 8000
_WISHES = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # to end it


def about(api_port: int) -> dict:
    """What the page shows and starts from."""
    static = policies.parse(smollm2.BEST_STATIC)
    return {
        "model": smollm2.NAME,
        "api": f"http://{HOST}:{api_port}/v1",
        "static": {"temperature": static.temperature, "min_p": static.min_p},
        "t_scale": float(smollm2.BEST_SCALE.removeprefix("scale=")),
        "min_p": json.loads((smollm2.HEAD / CONFIG_NAME).read_text())["min_p"],
        "shade": {"hottest": HOTTEST, "orange": ORANGE, "deepest": opacity(HOTTEST)},
        "examples": [{"name": each.name, "prompt": each.prompt} for each in TEST],
    }


def free_port(name: str, port: int) -> int:
    """The port, one of the system's choice for 0.

    Raises:
        ValueError: if it is none, or taken.
    """
    if not 0 <= port < 1 << 16:
        raise ValueError(f"{name} must be in [0, 65535], got {port}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ValueError(f"{name} {port} cannot be used: {line(error)}") from None
        return probe.getsockname()[1]


def serve(*, port: int, api_port: int) -> int:
    """Serves until the user interrupts; the exit code.

    Raises:
        ValueError: before anything is started.
    """
    if port and port == api_port:
        raise ValueError(f"--port and --api-port must differ, got {port} for both")
    port, api_port = free_port("--port", port), free_port("--api-port", api_port)
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"vLLM is not installed for {sys.executable}: `make serve` installs it")
    model = smollm2.folder()
    with tempfile.TemporaryDirectory(prefix="autodeco-serve-") as folder:
        log, said = Path(folder) / "temperatures.jsonl", Path(folder) / "vllm.log"
        log.touch()
        print(f"starting vLLM with {smollm2.NAME} …", file=sys.stderr, flush=True)
        engine = Engine(
            model, name=smollm2.NAME, head=smollm2.HEAD, port=api_port, log=log, said=said
        )
        try:
            if engine.wait_until_ready():
                _show_page(port, api_port, log, engine)
            print(engine.last_lines(), file=sys.stderr)
            print(f"error: vLLM ended with code {engine.process.wait()}", file=sys.stderr)
            return 1
        finally:
            engine.stop()


def _show_page(port: int, api_port: int, log: Path, engine: Engine) -> None:
    """Serves the page until vLLM ends."""
    with PageServer(
        port, api_port=api_port, model=smollm2.NAME, log=log, about=about(api_port)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            print(f"static and adaptive side by side: {server.url} (Ctrl-C stops)", flush=True)
            engine.process.wait()
        finally:
            server.shutdown()


def _interrupt(*_: object) -> None:
    for wish in _WISHES:  # one is enough: nothing is left behind by a second
        signal.signal(wish, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m autodeco_fast.demo.serve", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--port", type=int, default=PORT, help="of the page, 0 for a free one")
    parser.add_argument("--api-port", type=int, default=API_PORT, help="of vLLM, likewise")
    options = parser.parse_args(arguments)
    try:
        return serve(**vars(options))
    except KeyboardInterrupt:
        return 0
    except USERS as error:
        print(f"error: {line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for wish in _WISHES:
        signal.signal(wish, _interrupt)
    sys.exit(main())
