"""`python -m bench.gpu`: what it runs, in what order, and what it leaves when steps go wrong."""

import os
import tarfile
from pathlib import Path

import pytest

from bench import gpu
from bench import run as bench_run
from bench.machine import ROOT


def test_on_a_gpu_the_tests_of_every_kernel_are_run():
    """Every file that imports `tests.on_device`, whose ops run there, but for those that skip all
    of it on a GPU; no other."""
    users = {
        path.name: path.read_text()
        for path in (ROOT / "tests").glob("test_*.py")
        if any(
            "on_device" in line and line.lstrip().startswith(("from tests", "import tests"))
            for line in path.read_text().splitlines()
        )
    }
    run = {path.removeprefix("tests/") for path in gpu.kernel_tests()}
    assert run <= set(users)
    left_out = {"hostile_samplers", "hostile_stats", "interpreter", "memory_safety"}
    assert set(users) - run == {f"test_{name}.py" for name in left_out}
    assert {"test_nucleus_width.py", "test_ops.py", "test_autodeco_policy.py"} <= run
    assert gpu.OTHERS["tests"][-len(run) :] == gpu.kernel_tests()


def test_gpu_steps_go_on_after_a_failure_and_are_kept_one_by_one(tmp_path, monkeypatch, capsys):
    """Its logic alone: what it runs is replaced."""
    limits, archives = {}, []

    def run(arguments, *, log, limit):
        limits["tests"] = limit
        print("one test failed", file=log)
        return False

    def take(name, *, folder, tiny, log, limit):
        limits[name] = limit
        archives.append(sorted(path.name for path in tmp_path.glob("*")))
        return True

    monkeypatch.setattr(gpu, "device", lambda: "cuda")
    monkeypatch.setattr(gpu, "has_plugin", lambda: False)
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "take", take)
    arguments = ["tests", "sample", "limits", "generate"]
    with pytest.raises(SystemExit) as left:
        gpu.main([*arguments, "--output", str(tmp_path / "out"), "--deadline", "600"])
    assert left.value.code == 1
    assert set(limits) == {"tests", "limits", "generate"}  # `sample` needs the plugin
    assert all(limit <= 600 - bench_run.GRACE for limit in limits.values())
    assert archives == [["out", "out.tar.gz"]] * 2
    assert (tmp_path / "out/tests.log").read_text() == "one test failed\n"
    assert "FAILED, see" in capsys.readouterr().out


def test_a_rehearsal_goes_on_after_steps_that_fail_hang_and_are_killed(
    tmp_path, monkeypatch, capsys
):
    """Real processes, of small shapes; three of the steps are replaced by worse ones."""
    plain = bench_run.command
    worse = {
        "limits": "raise SystemExit(3)",
        "generate": "import time; time.sleep(600)",
        "scan": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    }

    def command(name, draft, *, tiny):
        return ["-c", worse[name]] if name in worse else plain(name, draft, tiny=tiny)

    def take(name, *, limit, **options):
        return bench_run.take(name, limit=1.0 if name == "generate" else limit, **options)

    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # by which the plugin knows xdist, and measures nothing
    monkeypatch.setattr(bench_run, "command", command)
    monkeypatch.setattr(gpu, "take", take)
    monkeypatch.setattr(gpu, "OTHERS", {"tests": ["-c", "print('collected')"]})
    steps = ["tests", *worse, "hinge"]
    where = ["--output", str(tmp_path / "out"), "--archive", str(tmp_path / "one.tar.gz")]
    with pytest.raises(SystemExit) as left:
        gpu.main([*steps, *where, "--tiny"])
    assert left.value.code == 1
    words = [line.split()[3] for line in capsys.readouterr().out.splitlines() if " s  " in line]
    assert words == ["ok", "FAILED,", "FAILED,", "FAILED,", "ok"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.tar.gz", "out"]
    with tarfile.open(tmp_path / "one.tar.gz") as archive:
        names = {Path(one.name).name for one in archive if one.isfile()}
    assert names == {*(f"{name}.log" for name in steps), "hinge.json"}


def test_what_matters_most_is_measured_first():
    assert gpu.STEPS[:3] == ["tests", "limits", "sample"]
    assert sorted(gpu.STEPS) == sorted(["tests", *bench_run.NAMES, "report"])
