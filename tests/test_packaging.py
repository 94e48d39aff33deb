"""The package works in place and from a wheel, and never claims the top-level name `kernels`."""

import json
import os
import subprocess
import sys
import textwrap
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def start(code: str, *, cwd: Path = ROOT, path: tuple[Path, ...] = ()) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "TRITON_INTERPRET"}}
    if path:
        env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def run(code: str) -> str:
    return finish(start(code))


def setuptools_will_do() -> bool:
    """Whether the one that is installed builds this package; else pip fetches one."""
    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "tree"  # setuptools writes build/ beside setup.py
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, tracked.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    if setuptools_will_do():
        command.append("--no-build-isolation")
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, timeout=600)
    return next(out.glob("*.whl"))


def test_wheel_holds_real_files_below_one_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"autodeco_fast"}
    for folder in ("kernels", "training"):
        ours = {f"autodeco_fast/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
        assert ours
        assert ours <= set(names)
    assert "autodeco_fast/demo/model/model.safetensors" in names
    assert "autodeco_fast/demo/serve/page/index.html" in names
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "training/__init__.py").exists()


def test_a_distribution_named_kernels_keeps_its_name(wheel, tmp_path):
    """Hugging Face's, here a stub, wins the name even where a folder `kernels/` lies."""
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("STUB = True\n")
    code = """
        import kernels, transformers, autodeco_fast, json
        from autodeco_fast import sample
        import autodeco_fast.training.stdlib_corpus as corpus
        print(json.dumps([kernels.STUB, autodeco_fast.__file__, corpus.__file__]))
    """
    processes = {cwd: start(code, cwd=cwd, path=(site,)) for cwd in (ROOT, tmp_path)}
    for cwd, process in processes.items():
        stub, package, corpus = json.loads(finish(process))
        assert stub is True
        home = ROOT if cwd == ROOT else site  # `-c` puts the working directory first
        assert Path(package).is_relative_to(home)
        assert Path(corpus).is_relative_to(home)


def test_import_is_light_and_silent():
    code = """
        import sys, torch
        before = set(sys.modules)
        import autodeco_fast
        new = {m.split(".")[0] for m in set(sys.modules) - before}
        assert not new & {"transformers", "triton", "matplotlib", "accelerate", "datasets"}, new
        assert autodeco_fast.sample is autodeco_fast.sample
        new = {m.split(".")[0] for m in set(sys.modules) - before}
        assert not new & {"transformers", "triton", "matplotlib", "accelerate", "datasets"}, new
    """
    assert run(code) == ""


def test_works_without_triton():
    code = """
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import torch, autodeco_fast
        z = torch.zeros(1, 5); z[0, 3] = 9
        print(autodeco_fast.sample(z, 0.0, seed=0).token.item())
    """
    assert run(code) == "3\n"


def test_public_names_are_there():
    import autodeco_fast

    for name in autodeco_fast.__all__:
        assert getattr(autodeco_fast, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = autodeco_fast.nothing


def test_links_are_relative():
    for folder in ("kernels", "training"):
        assert os.readlink(ROOT / "autodeco_fast" / folder) == f"../{folder}"
