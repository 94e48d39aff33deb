"""What starting costs: the import above torch's, the command line's help, `doctor`, and the first
token drawn on a CPU.

    python -m bench.end_to_end.startup

Each is a fresh interpreter; files are in the page cache after the first, untimed, start. The very
first call of an installation also compiles the CPU's loops, which numba then keeps on disk.
"""

import functools
import os
import subprocess
import sys
import tempfile

from bench.clock import in_turn, quantile
from bench.records import options, record

TORCH = "import torch"
SAMPLE = ["-c", "import torch, autodeco_fast; autodeco_fast.sample(torch.zeros(1, 9), 1.0, seed=0)"]
COMMANDS = {
    TORCH: ["-c", "import torch"],
    "import autodeco_fast": ["-c", "import autodeco_fast"],
    "autodeco-fast --help": ["-m", "autodeco_fast", "--help"],
    "autodeco-fast doctor": ["-m", "autodeco_fast", "doctor"],
    "import torch and the first draw": SAMPLE,
}
IN_TINY = (TORCH, "import autodeco_fast")


def start(arguments: list[str], **variables: str) -> None:
    subprocess.run(
        [sys.executable, *arguments],
        check=True,
        capture_output=True,
        env={**os.environ, **variables},
    )


def start_and_compile() -> None:
    with tempfile.TemporaryDirectory() as folder:
        start(SAMPLE, NUMBA_CACHE_DIR=folder)


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__).parse_args(arguments)
    names = IN_TINY if args.tiny else COMMANDS
    starts = {name: functools.partial(start, COMMANDS[name]) for name in names}
    rounds, warmup = (1, 0) if args.tiny else (20, 1)
    times = in_turn(starts, rounds=rounds, warmup=warmup, wall=True)
    if not args.tiny:
        compiling = {"the same, compiling": start_and_compile}
        times |= in_turn(compiling, rounds=5, warmup=1, wall=True)
    of_torch = quantile(times[TORCH], 0.5)
    results = [
        {"variant": name, "seconds": taken, "seconds_over_torch": quantile(taken, 0.5) - of_torch}
        for name, taken in times.items()
    ]
    record("startup", results, output=args.output)


if __name__ == "__main__":
    main()
