"""Everything worth doing on a machine with a GPU, what matters most first: the kernels' tests on
the device, its limits, every benchmark.

    python -m bench.gpu --output DIR [STEP …]
    python -m bench.gpu --output DIR --tiny

Works with what is installed: without pytest-benchmark, the scripts alone are run. A step that fails
or takes too long does not stop the others; its log says why. Records go to `bench/results/<card>`.
After every step DIR holds the logs and the records so far, and the archive the same in one file.
`--tiny` is the rehearsal: small shapes, on a CPU too, tests collected, records in DIR alone.
"""

import argparse
import importlib.util
import os
import re
import shutil
import sys
import time
from pathlib import Path

from bench.machine import RESULTS, ROOT, device, device_slug
from bench.run import GRACE, MICROBENCHMARKS, NAMES, has_plugin, parse_names, run, take

TESTS, REPORT = "tests", "report"
_ON_DEVICE = re.compile(r"^\s*from tests(?:\.on_device import|\s+import .*\bon_device\b)", re.M)
_ON_CPUS = 'pytestmark = pytest.mark.skipif(DEVICE != "cpu"'


def kernel_tests() -> list[str]:
    """The files whose tests run where the kernels do, but for those that ask for a CPU."""
    files = [(file.name, file.read_text()) for file in sorted((ROOT / "tests").glob("test_*.py"))]
    return [
        f"tests/{name}" for name, text in files if _ON_DEVICE.search(text) and _ON_CPUS not in text
    ]


_TOGETHER = ["-n", "8"] if importlib.util.find_spec("xdist") else []
OTHERS = {
    TESTS: ["-m", "pytest", "--continue-on-collection-errors", *_TOGETHER, *kernel_tests()],
    REPORT: ["-m", "bench.report"],
}
FIRST = ("limits", "sample", "linear_sample", "logit_stats", "token_stats", "training", "generate")
STEPS = [TESTS, *FIRST, *(name for name in NAMES if name not in FIRST), REPORT]


def step(name: str, output: Path, limit: float, *, tiny: bool) -> bool:
    """One step, its output in a log."""
    path = output / f"{name}.log"
    started = time.monotonic()
    with path.open("w", encoding="utf-8") as log:
        if name in OTHERS:
            rehearsed = ["--collect-only"] if tiny else []
            good = run([*OTHERS[name], *rehearsed], log=log, limit=limit)
        else:
            folder = output / device_slug() if tiny else None
            good = take(name, folder=folder, tiny=tiny, log=log, limit=limit)
    word = "ok" if good else f"FAILED, see {path}"
    print(f"{name:16} {time.monotonic() - started:6.0f} s  {word}", flush=True)
    return good


def keep(output: Path, archive: Path, *, tiny: bool) -> None:
    """Copies the records beside the logs, and all of it into one archive, whole or not at all."""
    records = RESULTS / device_slug()
    if records.exists() and not tiny:
        shutil.copytree(records, output / device_slug(), dirs_exist_ok=True)
    draft = shutil.make_archive(f"{archive}.draft", "gztar", output.parent, output.name)
    os.replace(draft, archive)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"some of {', '.join(STEPS)}")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="folder of copies")
    parser.add_argument("--archive", type=Path, help="the same in one file; else DIR.tar.gz")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a step may take")
    parser.add_argument("--deadline", type=float, help="seconds that all steps may take")
    parser.add_argument("--commit", help="the commit measured, where there is no git")
    parser.add_argument("--tiny", action="store_true", help="rehearses, without a GPU too")
    args = parser.parse_args(arguments)
    steps = parse_names(parser, args.steps, [s for s in STEPS if s != REPORT or not args.tiny])
    if device() != "cuda" and not args.tiny:
        parser.error("no GPU found: `make bench` measures CPUs")
    if args.commit:
        os.environ["BENCH_COMMIT"] = args.commit
    if not has_plugin():
        steps = [name for name in steps if name not in MICROBENCHMARKS]
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    archive = args.archive or Path(f"{output}.tar.gz")
    ends = time.monotonic() + (args.deadline or float("inf"))
    outcomes = []
    for name in steps:
        limit = min(args.limit, ends - time.monotonic() - GRACE)
        if limit <= 0:
            print(f"{name:16} left out: the deadline has come", flush=True)
            outcomes.append(False)
            continue
        outcomes.append(step(name, output, limit, tiny=args.tiny))
        keep(output, archive, tiny=args.tiny)
    sys.exit(0 if all(outcomes) else 1)


if __name__ == "__main__":
    main()
