"""Which implementation runs an op: the Triton kernels or the torch backend."""

import importlib.util
import os

import torch

BACKENDS = ("triton", "torch")


_TRITON = importlib.util.find_spec("triton") is not None


def triton_available() -> bool:
    """Whether Triton can be imported here (it is not imported by asking)."""
    return _TRITON


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's CPU interpreter (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def supported(*tensors: torch.Tensor) -> bool:
    """Whether the Triton kernels can run on these tensors: a CUDA or ROCm device and an installed Triton."""
    return triton_available() and all(t.is_cuda for t in tensors)


def resolve(backend: str | None, *tensors: torch.Tensor) -> str:
    """The backend an op will use.

    Args:
        backend: `"triton"`, `"torch"`, or None to choose: Triton where `supported`, else torch.
        tensors: the op's inputs.

    Raises:
        ValueError: if `backend` is no backend, or is `"triton"` where its kernels cannot run.
    """
    if backend is None:
        return "triton" if supported(*tensors) else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be None, 'triton' or 'torch', got {backend!r}")
    if backend == "triton" and not supported(*tensors):
        if not triton_available():
            raise ValueError("backend='triton' needs the triton package, which is not installed")
        if not interpreting():
            devices = sorted({str(t.device) for t in tensors})
            raise ValueError(
                f"backend='triton' needs CUDA or ROCm tensors, got {', '.join(devices)} (TRITON_INTERPRET=1 interprets)"
            )
    return backend
