"""Every tensor argument of every op, strided and expanded, gives what it gives when contiguous; and
rows may be none."""

import pytest
import torch

import autodeco_fast
from tests.on_device import DEVICE, on_device, rows_far_apart
from tests.op_cases import CASES, TORCH_ONLY, flat, strided, tensors

ARGUMENTS = [(op, name) for op, (names, _) in CASES.items() for name in names]
ALL = {**CASES, **TORCH_ONLY}


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same values, the first dimension innermost."""
    return x.T.contiguous().T


def expanded(x: torch.Tensor) -> torch.Tensor:
    """Its first row, for all rows, once in memory."""
    return x[:1].expand_as(x)


def with_one(t: dict, name: str, view) -> tuple[dict, dict]:
    """The arguments with a view of one, and with a contiguous copy of it."""
    odd = view(t[name])
    return {**t, name: odd}, {**t, name: odd.clone(memory_format=torch.contiguous_format)}


def agree(call, odd: dict, plain: dict, name: str, **options) -> None:
    got, want = (flat(on_device(call)(t, **options)) for t in (odd, plain))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want):
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
def test_strided_arguments(op, name, backend):
    t, call = tensors(3), CASES[op][1]
    views = [strided, expanded] + [transposed] * (t[name].dim() == 2)
    for view in views:
        odd, plain = with_one(t, name, view)
        assert (
            view is strided
            or name in ("b2", "w2")
            or not odd[name].is_contiguous()
            or odd[name].dim() == 1
        )
        agree(call, odd, plain, f"{name} {view.__name__}", backend=backend)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, (names, _) in TORCH_ONLY.items() for name in names]
)
def test_strided_arguments_of_what_has_one_backend(op, name):
    t, call = tensors(3), TORCH_ONLY[op][1]
    for view in [strided, expanded] + [transposed] * (t[name].dim() == 2):
        agree(call, *with_one(t, name, view), f"{name} {view.__name__}")


@pytest.mark.parametrize("op", CASES)
def test_no_rows(op, backend):
    out = flat(on_device(CASES[op][1])(tensors(0), backend=backend))
    assert out
    if op in ("min_p_hinge_loss", "linear_nucleus_width_loss"):  # means
        assert out[0].item() == 0
    elif op == "temperature_head":
        assert all((x == 0).all() for x in out)
    else:
        assert all(0 in x.shape for x in out)


@pytest.mark.parametrize("op", TORCH_ONLY)
def test_no_rows_where_there_is_one_backend(op):
    out = flat(on_device(TORCH_ONLY[op][1])(tensors(0)))
    assert out[0].tolist() in ([], 0.0)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_row_in_half_precision(op, dtype, backend):
    assert all(
        x.shape[-1:] != (0,)
        for x in flat(on_device(CASES[op][1])(tensors(1, dtype), backend=backend))
    )


def test_rows_of_hidden_states_beyond_32_bits(backend):
    """The last of three, 2³¹ numbers behind the first."""
    near, weight = (torch.randn(n, 16).half().to(DEVICE) for n in (3, 50))
    far = rows_far_apart(near, 2**30)
    y, how = torch.tensor([1, 2, 3], device=DEVICE), {"fused": True, "backend": backend}
    T = torch.full((3,), 0.8, device=DEVICE)
    for op in (
        lambda h: autodeco_fast.linear_sample(h, weight, T, seed=3, **how).token,
        lambda h: autodeco_fast.token_stats(h, weight, y, **how).logsumexp,
        lambda h: autodeco_fast.target_logits(h, weight, y, first_id=0, **how),
    ):
        assert torch.equal(op(far), op(near))
