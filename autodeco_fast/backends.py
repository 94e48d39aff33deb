"""Which implementation runs an op: the Triton kernels or the torch backend."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from autodeco_fast.numerics import FLOATS

BACKENDS = ("triton", "torch")

_TRITON = importlib.util.find_spec("triton") is not None


def triton_available() -> bool:
    """Whether Triton can be imported here (it is not imported by asking)."""
    return _TRITON


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _recent(index: int) -> bool:
    """Whether Triton compiles for a GPU: AMD's, or NVIDIA's of compute capability 8 or newer."""
    return torch.version.hip is not None or _capability(index) >= (8, 0)


def is_hopper(index: int) -> bool:
    """Whether a GPU is NVIDIA's of compute capability 9, an H100 or its like; −1 is none."""
    return index >= 0 and torch.version.hip is None and _capability(index)[0] == 9


# What torch.compiler.assume_constant_result sets, which would import all of torch.compile here.
_recent._dynamo_marked_constant = is_hopper._dynamo_marked_constant = True


def supported(*tensors: torch.Tensor) -> bool:
    """Whether the Triton kernels can run on these tensors: an installed Triton, a ROCm device or a
    CUDA device of compute capability 8 or newer, no fp64."""
    for tensor in tensors:
        if not (tensor.is_cuda and _taken(tensor) and _recent(tensor.get_device())):
            return False
    return triton_available()


def _taken(tensor: torch.Tensor) -> bool:
    return tensor.dtype in FLOATS or not tensor.is_floating_point()


def refuse_transforms() -> None:
    """Raises where an op would give a wrong derivative, batch or trace without a word.
    `torch.compile` may pass."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(
            "autodeco_fast cannot run under torch.vmap, torch.func transforms or forward-mode "
            "differentiation: "
            "call it on whole batches, and take derivatives with torch.autograd"
        )
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "autodeco_fast cannot be traced by torch.jit.trace: use torch.compile or torch.export"
        )


def resolve(backend: str | None, *tensors: torch.Tensor) -> str:
    """The backend an op will use.

    Args:
        backend: `"triton"`, `"torch"`, or None to choose: Triton where `supported`, else torch.
        tensors: the op's inputs.

    Raises:
        ValueError: if `backend` is no backend, or is `"triton"` where its kernels cannot run.
        RuntimeError: as `refuse_transforms`.
    """
    refuse_transforms()
    if backend is None:
        return "triton" if supported(*tensors) else "torch"
    if not isinstance(backend, str) or backend not in BACKENDS:
        got = repr(backend) if isinstance(backend, str) else type(backend).__name__
        raise ValueError(f"backend must be None, 'triton' or 'torch', got {got}")
    if backend == "triton" and not supported(*tensors):
        if not triton_available():
            raise ValueError("backend='triton' needs the triton package, which is not installed")
        wrong = [str(t.dtype).removeprefix("torch.") for t in tensors if not _taken(t)]
        if wrong:
            raise ValueError(f"backend='triton' takes bfloat16, float16 or float32, got {wrong[0]}")
        old = [t.get_device() for t in tensors if t.is_cuda and not _recent(t.get_device())]
        if old:
            major, minor = _capability(old[0])
            raise ValueError(
                f"backend='triton' needs compute capability 8.0 or newer, got {major}.{minor}"
            )
        if not interpreting():
            devices = sorted({str(t.device) for t in tensors})
            raise ValueError(
                f"backend='triton' needs CUDA or ROCm tensors, got {', '.join(devices)} "
                "(TRITON_INTERPRET=1 interprets)"
            )
    return backend


_PACKAGES = {"triton": "kernels", "torch": "torch_backend"}


@functools.cache
def implementation(backend: str, function: str, module: str | None = None) -> Callable:
    """The function of a backend, whose module is imported when it is first asked for.

    Args:
        backend: `"triton"` or `"torch"`.
        function: its name, the same in both.
        module: the file in `kernels/` and in `torch_backend/`; by default of the same name.
    """
    path = f"autodeco_fast.{_PACKAGES[backend]}.{module or function}"
    return getattr(importlib.import_module(path), function)
