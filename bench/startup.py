"""What starting costs: the import above torch's, the command line's help, and `doctor`.

    python -m bench.startup

Each is a fresh interpreter; files are in the page cache after the first, untimed, start.
"""

import subprocess
import sys

from bench.harness import interleave, record

TORCH = "import torch"
COMMANDS = {
    TORCH: ["-c", "import torch"],
    "import autodeco_fast": ["-c", "import autodeco_fast"],
    "autodeco-fast --help": ["-m", "autodeco_fast", "--help"],
    "autodeco-fast doctor": ["-m", "autodeco_fast", "doctor"],
}


def start(arguments: list[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)


def main() -> None:
    times = interleave({name: lambda a=arguments: start(a) for name, arguments in COMMANDS.items()}, samples=20, warmup=1)
    rows = [{"start": name, **t, "over_torch": t["seconds"] - times[TORCH]["seconds"]} for name, t in times.items()]
    record("startup", rows)


if __name__ == "__main__":
    main()
