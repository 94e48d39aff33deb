"""The package works in place and from a wheel of its sdist, and never claims the name `kernels`."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UNPACK = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # 3.10's first have none


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


def build(kind: str, source: Path, out: Path) -> Path:
    """What the installed setuptools makes of a folder, beside whose setup.py it writes, too."""
    code = f"import setuptools.build_meta as it; it.build_{kind}({str(out)!r})"
    finish(start(code, cwd=source))
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("autodeco_fast", "kernels", "training"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """From what the sdist holds."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(sdist, unpacked, **UNPACK)
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_sdist_holds_what_is_installed(sdist):
    with tarfile.open(sdist) as archive:
        names = {m.name.split("/", 1)[-1]: m.size for m in archive.getmembers() if m.isfile()}
    for folder in ("kernels", "training"):
        ours = {f"{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
        assert ours
        assert ours <= set(names)
    data = {
        str(path.relative_to(ROOT))
        for folder in ("demo/model", "demo/heads", "demo/serve/page")
        for path in (ROOT / "autodeco_fast" / folder).rglob("*")
        if path.is_file()
    }
    assert {"autodeco_fast/demo/model/model.safetensors"} < data
    assert any(name.startswith("autodeco_fast/demo/heads/") for name in data)
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} | data <= set(names)
    assert all(names[name] == (ROOT / name).stat().st_size for name in data)


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
