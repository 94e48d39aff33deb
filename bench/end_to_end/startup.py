"""What starting costs: the import above torch's, the command line's help, `doctor`, and the first
draw on a CPU.

    python -m bench.end_to_end.startup

Each is a fresh interpreter; files are in the page cache after the first, untimed, start. The very
first draw of an installation also compiles the CPU's loops, which numba then keeps on disk.
"""

import os
import subprocess
import sys
import tempfile

from bench.clock import interleave
from bench.records import record

TORCH = "import torch"
DRAW = ["-c", "import torch, autodeco_fast; autodeco_fast.sample(torch.zeros(1, 9), 1.0, seed=0)"]
COMMANDS = {
    TORCH: ["-c", "import torch"],
    "import autodeco_fast": ["-c", "import autodeco_fast"],
    "autodeco-fast --help": ["-m", "autodeco_fast", "--help"],
    "autodeco-fast doctor": ["-m", "autodeco_fast", "doctor"],
    "import torch and the first draw": DRAW,
}


def start(arguments: list[str], **variables: str) -> None:
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, **variables},
    )


def start_and_compile() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start(DRAW, NUMBA_CACHE_DIR=folder)


def main() -> None:
    times = interleave(
        {name: lambda a=arguments: start(a) for name, arguments in COMMANDS.items()},
        rounds=20,
        warmup=1,
    )
    times |= interleave({"the same, compiling": start_and_compile}, rounds=5, warmup=1)
    rows = [
        {"start": name, **t, "over_torch": t["seconds"] - times[TORCH]["seconds"]}
        for name, t in times.items()
    ]
    record("startup", rows)


if __name__ == "__main__":
    main()
