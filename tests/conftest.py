"""Kernels run in Triton's interpreter unless a GPU is there; whatever a kernel forgets to write shows up as NaN."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _poison(t: torch.Tensor) -> torch.Tensor:
    if t.is_floating_point():
        return t.fill_(float("nan"))
    return t if t.dtype == torch.bool or t.is_complex() else t.fill_(-77 if t.dtype.is_signed else 77)


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """`torch.empty` and `torch.empty_like` return NaN (or -77) instead of whatever the memory held."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _f=original, **k: _poison(_f(*a, **k)))


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    return request.param
