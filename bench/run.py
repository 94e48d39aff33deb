"""Benchmarks, each in a process of its own, with their records in `bench/results/<device>`.

    python -m bench.run [NAME …]

A name is that of a microbenchmark (`sample` is `bench/test_sample.py`), of a script of
`bench/end_to_end`, or `limits`; all of them, if none is given. One that fails does not stop the
others.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

from bench.machine import RESULTS, ROOT, device_slug

COLUMNS = "median,iqr,rounds"
MICROBENCHMARKS = sorted(
    path.stem.removeprefix("test_") for path in (ROOT / "bench").glob("test_*.py")
)
NEEDED = {"serving": "vllm"}  # scripts that are left out where a module is missing
SCRIPTS = {
    "limits": "bench.limits",
    **{
        p.stem: f"bench.end_to_end.{p.stem}"
        for p in sorted((ROOT / "bench/end_to_end").glob("*.py"))
        if importlib.util.find_spec(NEEDED.get(p.stem, "bench"))
    },
}
NAMES = ["limits", *MICROBENCHMARKS, *(name for name in SCRIPTS if name != "limits")]
GRACE = 60.0  # seconds in which an interrupted benchmark may write what it has


def has_plugin() -> bool:
    """pytest-benchmark is here; one line says so, if it is not."""
    if importlib.util.find_spec("pytest_benchmark"):
        return True
    print("pytest-benchmark is not installed: microbenchmarks are left out", flush=True)
    return False


def command(name: str, draft: Path, *, tiny: bool = False) -> list[str]:
    """What takes the record of a benchmark to the file `draft`."""
    if name in SCRIPTS:
        return ["-m", SCRIPTS[name], "--output", str(draft), *(["--tiny"] if tiny else [])]
    options = [f"--benchmark-json={draft}", f"--benchmark-columns={COLUMNS}"]
    options += ["--bench-shapes=tiny"] if tiny else []
    return ["-m", "pytest", f"bench/test_{name}.py", "--benchmark-only", *options]


def run(arguments: list[str], *, log: IO[str] | None = None, limit: float | None = None) -> bool:
    """One Python process. One that takes longer than `limit` seconds is interrupted, as by Ctrl-C:
    pytest then writes the groups that it has finished."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=env, stdout=log, stderr=log
    )
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        print(f"interrupted after {limit:.0f} s", file=log or sys.stdout, flush=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    except KeyboardInterrupt:  # the process has had it too
        process.wait()
        raise


def take(
    name: str,
    *,
    folder: Path | None = None,
    tiny: bool = False,
    log: IO[str] | None = None,
    limit: float | None = None,
) -> bool:
    """Takes a benchmark's record into `folder`; what an earlier run left there is replaced only by
    a record."""
    folder = folder or RESULTS / device_slug()
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{name}.draft"
    try:
        good = run(command(name, draft, tiny=tiny), log=log, limit=limit)
        if draft.exists() and draft.stat().st_size:
            draft.replace(folder / f"{name}.json")
    finally:
        draft.unlink(missing_ok=True)
    return good


def parse_names(parser: argparse.ArgumentParser, names: list[str], known: list[str]) -> list[str]:
    unknown = sorted(set(names) - set(known))
    if unknown:
        parser.error(f"names must be among {', '.join(known)}, got {', '.join(unknown)}")
    return names or known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--tiny", action="store_true", help="small, to see that all run")
    parser.add_argument("--output", type=Path, help="folder of the records; else bench/results")
    args = parser.parse_args()
    if args.tiny and not args.output:
        parser.error("--tiny needs --output: its numbers are no records")
    names = parse_names(parser, args.names, NAMES)
    if not has_plugin():
        names = [name for name in names if name in SCRIPTS]
    failed = [name for name in names if not take(name, folder=args.output, tiny=args.tiny)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
