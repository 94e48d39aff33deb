"""Every registered op under `torch.library.opcheck`: schema, fake tensors, autograd and tracing, on
both backends."""

import pytest
import torch

from autodeco_fast.ops import (
    linear_sample,
    logit_stats,
    min_p_hinge,
    nucleus_width,
    prob_stats,
    sample,
    sample_partial,
    soft_top_p,
    subtile_maxima,
    temperature_head,
    token_stats,
    token_stats_partial,
)
from autodeco_fast.sampling import FULL_LOGPROB, KEPT, LOGPROB
from tests.on_device import DEVICE

# What is registered for autograd and tracing knows no dtype; what an op returns does.
OF_RESULTS = ("test_schema", "test_faketensor")
CHECKS = {
    torch.float32: (*OF_RESULTS, "test_autograd_registration", "test_aot_dispatch_dynamic"),
    torch.bfloat16: OF_RESULTS,
    torch.float16: OF_RESULTS,
}
_WANTED = {"token": 0, "logprob and kept": LOGPROB | KEPT, "full_logprob": FULL_LOGPROB}


def rand(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE).to(dtype).requires_grad_(grad)


def full(n: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((n,), value, dtype=dtype, device=DEVICE)


def ids(n: int) -> torch.Tensor:
    return full(n, 3, torch.int64)


def cases(dtype: torch.dtype) -> dict:
    """name → the op, and what makes its arguments; logits, hidden states and weights in this
    dtype."""

    def x(*shape: int, grad: bool = False) -> torch.Tensor:
        return rand(*shape, grad=grad, dtype=dtype)

    def product() -> tuple[torch.Tensor, torch.Tensor]:
        return x(5, 8), x(40, 8)

    def heads() -> list[torch.Tensor]:
        return [x(*shape, grad=True) for shape in ((16, 8), (16,), (16,), (1,))]

    numbers = [0.0, 0.1, 1.0], [0, 7, 0, -1]
    return {
        "logit_stats": (
            logit_stats._logit_stats,
            lambda: (x(5, 40), ids(5), None, rand(5), 1.0, None, False),
        ),
        "logit_stats, cut": (
            logit_stats._logit_stats,
            lambda: (x(5, 40), ids(5), rand(5), rand(5), 1.0, None, True),
        ),
        "token_stats": (
            token_stats._token_stats,
            lambda: (*product(), ids(5), None, rand(5), x(40), 0.5, 30.0, False, 0),
        ),
        "token_stats, chunked": (
            token_stats._token_stats,
            lambda: (*product(), ids(5), rand(5), None, None, 1.0, None, False, 320),
        ),
        "token_stats, cut": (
            token_stats._token_stats,
            lambda: (*product(), ids(5), rand(5), rand(5), None, 1.0, None, True, 0),
        ),
        "prob_stats": (prob_stats._prob_stats, lambda: (x(5, 40), rand(5), 0.5, None)),
        **{
            f"sample, {name}": (
                sample._sample,
                lambda want=want: (
                    *(x(5, 40), [full(5, 0.7), *[None] * 6], *numbers, None, None, want),
                ),
            )
            for name, want in _WANTED.items()
        },
        "sample, maxima": (
            sample._sample,
            lambda: (x(5, 40), [full(5, 0.7), *[None] * 6], *numbers, None, rand(5, 1) + 1, 0),
        ),
        "sample_partial": (
            sample_partial._op,
            lambda: (x(5, 40), [full(5, 0.7), *[None] * 6], *numbers, None, 8, rand(5) + 1),
        ),
        "target_logits": (
            token_stats_partial._target_logits,
            lambda: (*product(), ids(5), x(40), 0.5, 30.0, True),
        ),
        "subtile_maxima": (
            subtile_maxima._subtile_maxima,
            lambda: (x(5, 300), torch.ones(5, 10, device=DEVICE).int()),
        ),
        **{
            f"linear_sample, full={bool(want)}": (
                linear_sample._linear_sample,
                lambda want=want: (
                    *product(),
                    None,
                    1.0,
                    None,
                    [full(5, 0.7), *[None] * 6],
                    *numbers,
                    want,
                ),
            )
            for want in (FULL_LOGPROB, 0)
        },
        "temperature_head": (temperature_head._head, lambda: (x(5, 8), *heads(), 2.0)),
        "temperature_head, hidden states too": (
            temperature_head._head,
            lambda: (x(5, 8, grad=True), *heads(), 2.0),
        ),
        "min_p_hinge": (
            min_p_hinge._op,
            lambda: (rand(5, grad=True), rand(5), ids(5), rand(5), 0.4, 0.1, 1, 2.0, False),
        ),
        "nucleus_width": (
            nucleus_width.nucleus_width,
            lambda: (
                *(rand(5, grad=True), x(5, 40), None, None),
                *(rand(5), 0.4, 0.1, 2.0, False, 0.5, 30.0, 320),
            ),
        ),
        "nucleus_width of hidden states": (
            nucleus_width.nucleus_width,
            lambda: (
                *(rand(5, grad=True), *product(), x(40)),
                *(None, 0.4, 0.1, 2.0, True, 1.0, None, 320),
            ),
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
    torch.library.opcheck(op, (*arguments(), *backends), test_utils=CHECKS[dtype])


def test_fresh_memory_is_poisoned():
    """The control of all tests that look for what an op forgets to write."""
    x = torch.ones(3)
    ids = torch.ones(3, dtype=torch.int32)
    for fresh in (
        torch.empty(3),
        torch.empty_like(x),
        torch.empty_strided((3,), (2,)),
        x.new_empty(3),
    ):
        assert fresh.isnan().all()
    assert (ids.new_empty(3) == -77).all()
