"""Every registered op under `torch.library.opcheck`: schema, fake tensors, autograd and tracing, on
both backends."""

import pytest
import torch

from autodeco_fast.ops import (
    linear_sample,
    logit_stats,
    min_p_hinge,
    prob_stats,
    sample,
    soft_top_p,
    temperature_head,
    token_stats,
)
from tests.on_device import DEVICE


def rand(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE).to(dtype).requires_grad_(grad)


def full(n: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((n,), value, dtype=dtype, device=DEVICE)


ids = lambda n: full(n, 3, torch.int64)


def cases(dtype: torch.dtype) -> dict:
    """name → the op, and what makes its arguments; logits, hidden states and weights in this
    dtype."""
    x = lambda *shape, grad=False: rand(*shape, grad=grad, dtype=dtype)
    product = lambda: (x(5, 8), x(40, 8))
    heads = lambda: [x(*shape, grad=True) for shape in ((16, 8), (16,), (16,), (1,))]
    numbers = [0.0, 0.1, 1.0], [7, 0, -1, 0]
    return {
        "logit_stats": (
            logit_stats._logit_stats,
            lambda: (x(5, 40), ids(5), None, rand(5), 1.0, None),
        ),
        "token_stats": (
            token_stats._token_stats,
            lambda: (*product(), ids(5), None, rand(5), x(40), 0.5, 30.0, 0),
        ),
        "token_stats, chunked": (
            token_stats._token_stats,
            lambda: (*product(), ids(5), rand(5), None, None, 1.0, None, 320),
        ),
        "prob_stats": (prob_stats._prob_stats, lambda: (x(5, 40), rand(5), 0.5, None)),
        **{
            f"sample, {want or 'token'}": (
                sample._sample,
                lambda want=want: (x(5, 40), [full(5, 0.7), *[None] * 6], *numbers, None, want),
            )
            for want in ("", "logprob kept", "full_logprob")
        },
        **{
            f"linear_sample, full={full_}": (
                linear_sample._linear_sample,
                lambda f=full_: (
                    *product(),
                    None,
                    1.0,
                    None,
                    [full(5, 0.7), *[None] * 4],
                    [0.0, 0.1],
                    [7, 0, -1],
                    f,
                ),
            )
            for full_ in (True, False)
        },
        "temperature_head": (temperature_head._head, lambda: (x(5, 8), *heads(), 2.0)),
        "temperature_head, hidden states too": (
            temperature_head._head,
            lambda: (x(5, 8, grad=True), *heads(), 2.0),
        ),
        "min_p_hinge": (
            min_p_hinge.min_p_hinge,
            lambda: (rand(5, grad=True), rand(5), ids(5), rand(5), 0.4, 0.1, 1, 2.0, False),
        ),
        "soft_top_p": (
            soft_top_p._soft_top_p,
            lambda: (*product(), ids(5), rand(5), rand(5), None, 30.0, 1.0, None, 320),
        ),
        "soft_top_p of logits": (
            soft_top_p._soft_top_p,
            lambda: (x(5, 40), None, ids(5), rand(5), rand(5), None, 30.0, 1.0, None, 320),
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", cases(torch.float32))
def test_opcheck(name, dtype, backend):
    op, arguments = cases(dtype)[name]
    backends = () if op is soft_top_p._soft_top_p else (backend,)
    torch.library.opcheck(op, (*arguments(), *backends))
