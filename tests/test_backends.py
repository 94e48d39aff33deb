"""Both backends offer the same functions: file by file, with the same signatures."""

import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

import autodeco_fast.kernels
import autodeco_fast.torch_backend
from autodeco_fast import backends
from autodeco_fast.backends import implementation, resolve

# How a launcher cuts its work up; results do not depend on these, and CPUs need none.
TUNING = {"tile", "splits", "depth", "variant"}


_NOT_IMPORTED = {  # beginnings of modules' names
    "triton": ("autodeco_fast.torch_backend", "numba"),
    "torch": ("autodeco_fast.kernels",),
}


def launchers(module: ModuleType) -> Iterator[tuple[str, Callable]]:
    """The public functions of a kernel file that launch something on their arguments' device."""
    for name, value in vars(module).items():
        here = getattr(value, "__module__", None) == module.__name__
        if here and not name.startswith("_") and hasattr(value, "__wrapped__"):
            yield name, value


def kernel_files() -> list[str]:
    names = [m.name for m in pkgutil.iter_modules(autodeco_fast.kernels.__path__)]
    modules = {n: importlib.import_module(f"autodeco_fast.kernels.{n}") for n in names}
    return [name for name, module in modules.items() if dict(launchers(module))]


@pytest.mark.parametrize("name", kernel_files())
def test_the_torch_backend_mirrors_the_kernels(name):
    kernels = importlib.import_module(f"autodeco_fast.kernels.{name}")
    torch_backend = importlib.import_module(f"autodeco_fast.torch_backend.{name}")
    for function, launcher in launchers(kernels):
        theirs = inspect.signature(launcher).parameters
        theirs = [p for p in theirs.values() if p.name not in TUNING]
        ours = list(inspect.signature(getattr(torch_backend, function)).parameters.values())
        assert [(p.name, p.kind, p.default) for p in ours] == [
            (p.name, p.kind, p.default) for p in theirs
        ], function
        assert [str(p.annotation) for p in ours] == [str(p.annotation) for p in theirs], function


def test_what_is_compared():
    """The rule sees every family; soft top-p has no kernel: it sorts."""
    assert set(kernel_files()) == {
        *("sample", "linear_sample", "top_k_top_p", "logit_stats", "token_stats", "prob_stats"),
        *("temperature_head", "min_p_hinge", "nucleus_width", "subtile_maxima", "quantized_head"),
    }


def test_an_implementation_is_found_once_and_by_name():
    assert implementation("torch", "sample") is implementation("torch", "sample")
    assert implementation("torch", "target_logit", module="token_stats").__name__ == "target_logit"
    with pytest.raises(AttributeError):
        implementation("torch", "no_such", module="sample")


@pytest.fixture
def card(monkeypatch):
    """Every tensor says that it is on a GPU of this compute capability."""

    def of(capability: tuple[int, int], hip: str | None = None) -> torch.Tensor:
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
        monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 0)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(backends, "_capability", lambda index: capability)
        return torch.ones(2, 3)

    return of


def test_a_gpu_that_triton_does_not_compile_for_gets_torch(card):
    x = card((7, 5))
    assert resolve(None, x) == "torch"
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0 or newer, got 7\.5$"):
        resolve("triton", x)


@pytest.mark.parametrize("capability, hip", [((8, 0), None), ((9, 0), None), ((7, 5), "6.4")])
def test_other_gpus_get_triton(capability, hip, card):
    x = card(capability, hip)
    assert resolve(None, x) == resolve("triton", x) == "triton"


def test_a_compiler_does_not_look_for_the_gpu(monkeypatch):
    """Which one a tensor is on is settled when it traces."""

    def capability(index):
        os.stat("/")  # what no compiler takes into a graph
        return 9, 0

    monkeypatch.setattr(backends, "_capability", capability)

    def asks(x: torch.Tensor) -> torch.Tensor:
        index = x.get_device()
        return x + backends._recent(index) + 2 * backends.is_hopper(index + 1)

    assert torch.compile(asks, backend="eager", fullgraph=True)(torch.zeros(1)).tolist() == [3.0]


def test_a_backend_is_imported_only_where_it_runs():
    """numba costs 0.4 s: who runs kernels does not pay it, and torch's users import no kernel."""
    script = """
        import sys, torch
        from autodeco_fast import logit_stats, min_p_hinge_loss, sample, token_stats
        z, y, T = torch.randn(2, 50), torch.arange(2), torch.ones(2)
        stats = logit_stats(z, y, temperature=T, backend={backend!r})
        sample(z, T, min_p=0.1, top_k=5, seed=0, backend={backend!r})
        min_p_hinge_loss(T, stats, backend={backend!r})
        token_stats(torch.randn(2, 16), torch.randn(50, 16), y, backend={backend!r})
        assert not [name for name in sys.modules if name.startswith({absent!r})]
    """
    for backend, absent in _NOT_IMPORTED.items():
        code = textwrap.dedent(script.format(backend=backend, absent=absent))
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
