"""Code in processes of its own that can be killed. They are forked from one process which has
imported the library already, so that a start costs a moment and not the import."""

import multiprocessing
import os
import socket
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.commands import Done

TIMEOUT = 300.0  # seconds
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.training_runs", "autodeco_fast.training.run"])


def _execute(code: str, variables: dict[str, str], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})


def forked(code: str, *variables: dict[str, str]) -> Done:
    """Runs the code in a process for each of these environments, one without any. Once one fails
    the others are ended; its exit status, −9 for SIGKILL, is the result's. All that they print
    counts as standard error."""
    with TemporaryDirectory() as folder:
        logs = [Path(folder) / str(i) for i in range(max(1, len(variables)))]
        processes = [
            _CONTEXT.Process(target=_execute, args=(code, one, log))
            for one, log in zip(variables or [{}], logs)
        ]
        for process in processes:
            process.start()
        status = _status(processes)
        for process in processes:
            process.kill()
            process.join()
        return Done(status, "", "".join(log.read_text() for log in logs))


def _status(processes: list) -> int:
    """0 once all have ended well, else that of the first to fail."""
    for _ in range(int(TIMEOUT / 0.02)):
        codes = [process.exitcode for process in processes]
        if any(codes) or None not in codes:
            return next(filter(None, codes), 0)
        time.sleep(0.02)
    raise TimeoutError(f"{len(processes)} processes did not end in {TIMEOUT:.0f} s")


def on_two_processes(code: str) -> Done:
    """Runs the code in two processes of one group (gloo)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    return forked(code, *({**group, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"))
