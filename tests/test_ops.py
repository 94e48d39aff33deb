"""Every registered op under `torch.library.opcheck`: schema, fake tensors, autograd and tracing, on both backends."""

import pytest
import torch

from autodeco_fast.ops import (
    linear_sample,
    logit_stats,
    min_p_hinge,
    min_p_sample,
    prob_stats,
    soft_top_p,
    temperature_head,
    token_stats,
)
from tests.on_device import DEVICE


def rand(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE).requires_grad_(grad)


def full(n: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((n,), value, dtype=dtype, device=DEVICE)


ids = lambda n: full(n, 3, torch.int64)  # noqa: E731
CASES = {
    "logit_stats": (logit_stats._logit_stats, lambda: (rand(5, 40), ids(5), None, rand(5), 1.0, None)),
    "token_stats": (token_stats._token_stats, lambda: (rand(5, 8), rand(40, 8), ids(5), None, rand(5), rand(40), 0.5, 30.0, 0)),
    "token_stats, chunked": (
        token_stats._token_stats,
        lambda: (rand(5, 8), rand(40, 8), ids(5), rand(5), None, None, 1.0, None, 320),
    ),
    "prob_stats": (prob_stats._prob_stats, lambda: (rand(5, 40), rand(5), 0.5, None)),
    "min_p_sample": (
        min_p_sample._min_p_sample,
        lambda: (rand(5, 40), [full(5, 0.7), *[None] * 6], [0.0, 0.1, 1.0], [7, 0, -1, 0], None, "logprob kept"),
    ),
    "linear_sample": (
        linear_sample._linear_sample,
        lambda: (rand(5, 8), rand(40, 8), None, 1.0, None, [full(5, 0.7), *[None] * 4], [0.0, 0.1], [7, 0, -1], True),
    ),
    "temperature_head": (
        temperature_head._head,
        lambda: (rand(5, 8), rand(16, 8, grad=True), rand(16, grad=True), rand(16, grad=True), rand(1, grad=True), 2.0),
    ),
    "min_p_hinge": (
        min_p_hinge.min_p_hinge,
        lambda: (rand(5, grad=True), rand(5), ids(5), rand(5), 0.4, 0.1, 1, 2.0, False),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, backend):
    op, arguments = CASES[name]
    torch.library.opcheck(op, (*arguments(), backend))


@pytest.mark.parametrize("fused", [True, False])
def test_opcheck_soft_top_p(fused):
    data = (rand(5, 8), rand(40, 8)) if fused else (rand(5, 40), None)
    torch.library.opcheck(soft_top_p._soft_top_p, (*data, ids(5), rand(5), rand(5), None, 30.0, 1.0, None, 320))
