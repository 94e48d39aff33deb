"""The hinge without labels against fp64 formulas, and against the hinge with labels that it is the
expectation of, on both backends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import autodeco_fast
from autodeco_fast import logit_stats, min_p_hinge_loss
from tests.allocations import LargestAllocation
from tests.on_device import linear_nucleus_width_loss, nucleus_width_loss

INF = float("inf")


def make(N, V, dtype=torch.float32, spread=4.0):
    g = torch.Generator().manual_seed(N + V)
    return (torch.randn(N, V, generator=g) * spread).to(dtype), torch.rand(N, generator=g) * 2


def reference(
    T,
    x,
    *,
    min_p=0.1,
    gravity=0.1,
    max_temperature=2.0,
    unreachable="drop",
    scale=1.0,
    softcap=None,
    row_weight=None,
):
    """Rows' losses in fp64; autograd gives their slopes."""
    z = x.double() * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    required = (z.amax(-1, keepdim=True) - z) / -math.log(min_p)
    p = z.softmax(-1)
    if unreachable == "drop":
        p = torch.where(required <= max_temperature, p, 0.0)
    else:
        required = required.clamp(max=max_temperature)
    beyond = (required - T.double()[:, None]).clamp(min=0) + gravity * T.double()[:, None]
    loss = torch.where(p > 0, p * beyond, 0.0).sum(-1)
    return loss if row_weight is None else loss * row_weight.double()


def assert_rows(T, x, backend, **options):
    """Values and slopes of every row."""
    ours, exact = T.clone().requires_grad_(), T.double().requires_grad_()
    got = nucleus_width_loss(ours, x, reduction="none", backend=backend, **options)
    if "logit_scale" in options:
        options["scale"] = options.pop("logit_scale")
    want = reference(exact, x, **options)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-6)
    got.sum().backward()
    want.sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("N, V", [(1, 1), (3, 5), (7, 999), (4, 4096), (5, 4097), (2, 9000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_fp64(N, V, dtype, backend):
    x, T = make(N, V, dtype)
    assert_rows(T, x, backend)
    options = {"row_weight": torch.rand(N), "gravity": 0.3, "min_p": 0.02}
    assert_rows(T, x, backend, unreachable="clip", max_temperature=1.5, **options)


@pytest.mark.parametrize("softcap", [None, 2.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_transform_comes_before_the_padding_mask(softcap, scale, backend):
    x, T = make(4, 37, spread=20)
    options = {"softcap": softcap, "logit_scale": scale}
    if softcap:  # logits near the cap tie in fp32 and not in fp64: T* must not lie on T
        T = T * 0.01
    assert_rows(T, x, backend, **options)


@settings(max_examples=25)
@given(
    st.integers(1, 6),
    st.integers(1, 700),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.sampled_from([1e-4, 0.1, 0.9]),
    st.sampled_from(["drop", "clip"]),
    st.sampled_from(["torch", "triton"]),
)
def test_any_shape(N, V, spread, min_p, unreachable, backend):
    x, T = make(N, V, spread=spread)
    assert_rows(T, x, backend, min_p=min_p, unreachable=unreachable)


@pytest.mark.parametrize("unreachable", ["drop", "clip"])
def test_is_the_expectation_of_the_hinge(unreachable, backend):
    """Over every target, by the model's own probabilities."""
    (x, T), V = make(3, 40), 40
    options = {"min_p": 0.05, "gravity": 0.2, "unreachable": unreachable, "max_temperature": 2.0}
    want = torch.zeros(3, dtype=torch.float64)
    for y in range(V):
        stats = logit_stats(x.double(), torch.full((3,), y))
        loss = min_p_hinge_loss(T.double(), stats, reduction="none", **options)
        want += stats.target_prob * loss
    got = nucleus_width_loss(T, x, reduction="none", backend=backend, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_the_slope_is_the_kept_mass_less_what_is_wanted(backend):
    x, T = make(6, 300)
    T.requires_grad_()
    options = {"gravity": 0.25, "unreachable": "clip", "reduction": "sum"}
    nucleus_width_loss(T, x, backend=backend, **options).backward()
    z = x.double()
    kept = z >= z.amax(-1, keepdim=True) + T.detach()[:, None] * math.log(0.1)
    mass = (z.softmax(-1) * kept).sum(-1)
    torch.testing.assert_close(T.grad.double(), mass - 0.75, rtol=0, atol=1e-6)


def test_the_minimiser_keeps_top_p_s_set():
    """Found by bisection of the slope: the lowest T whose kept set has the mass."""
    x, _ = make(20, 200, spread=2.0)
    x = x.double()
    low, high = torch.zeros(20).double(), torch.full((20,), 20.0).double()
    for _ in range(40):
        T = ((low + high) / 2).requires_grad_()
        loss = nucleus_width_loss(T, x, reduction="sum", max_temperature=100.0)
        (slope,) = torch.autograd.grad(loss, T)
        enough = slope >= 0
        high, low = torch.where(enough, T, high).detach(), torch.where(enough, low, T).detach()
    top = x.amax(-1, keepdim=True)
    kept = (x >= top + high[:, None] * math.log(0.1)).sum(-1)
    mass = x.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    assert kept.tolist() == ((mass < 0.9).sum(-1) + 1).tolist()


def test_extreme_equal_and_minus_inf(backend):
    x = torch.zeros(6, 70)
    x[1] = 1e4
    x[2] = -INF
    x[2, 17] = 2.0
    x[3, 3], x[3, 5] = 1e4, -1e4
    x[4] = -INF  # nothing can be drawn
    x[5, ::2] = -INF
    T = torch.full((6,), 0.5, requires_grad=True)
    loss = nucleus_width_loss(T, x, reduction="none", backend=backend)
    loss.sum().backward()
    some = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(loss, 0.05 * some)
    torch.testing.assert_close(T.grad, 0.1 * some)


@pytest.mark.parametrize("value", [float("nan"), INF])
def test_a_bad_row_is_nan_alone_or_left_out(value, backend):
    x, T = make(3, 50)
    x[1, 7] = value
    rows = nucleus_width_loss(T, x, reduction="none", backend=backend)
    assert rows.isnan().tolist() == [False, True, False]
    weight = torch.tensor([1.0, 0.0, 2.0])
    T.requires_grad_()
    mean = nucleus_width_loss(T, x, row_weight=weight, backend=backend)
    mean.backward()
    torch.testing.assert_close(mean, (rows[0] + 2 * rows[2]) / 3)
    assert T.grad[1] == 0
    assert T.grad.isfinite().all()


def test_no_rows_and_no_weight_are_zero(backend):
    x, T = make(3, 11)
    assert nucleus_width_loss(T[:0], x[:0], backend=backend).item() == 0
    assert nucleus_width_loss(T, x, row_weight=torch.zeros(3), backend=backend).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_the_product_change_nothing(dtype, backend):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 16, generator=g), torch.randn(90, 16, generator=g)
    bias, T = torch.randn(90, generator=g), torch.rand(7, generator=g)
    hidden, weight, bias = (t.to(dtype) for t in (hidden, weight, bias))
    logits = torch.addmm(bias, hidden, weight.T)
    options = {"softcap": 5.0, "logit_scale": 0.5, "row_weight": T + 1, "backend": backend}
    want = nucleus_width_loss(T, logits, **options)
    for chunk_bytes in (1, 400, 1 << 20):
        leaf = T.clone().requires_grad_()
        got = linear_nucleus_width_loss(
            leaf, hidden, weight, bias=bias, chunk_bytes=chunk_bytes, **options
        )
        torch.testing.assert_close(
            got, want, rtol=2e-3 if dtype == torch.bfloat16 else 1e-5, atol=0
        )
        got.backward()
        assert leaf.grad.any()


def test_never_holds_all_logits():
    hidden, weight = torch.randn(64, 8), torch.randn(3000, 8)
    with LargestAllocation() as seen:
        autodeco_fast.linear_nucleus_width_loss(
            torch.rand(64), hidden, weight, chunk_bytes=8 * 3000 * 4
        )
    assert seen.numel <= 8 * 3000


def test_gradcheck():
    x, T = make(8, 30)
    T = T.double().requires_grad_()
    weight = torch.rand(8, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        options = {"row_weight": weight, "reduction": reduction, "backend": "torch"}
        assert torch.autograd.gradcheck(
            lambda t, o=options: autodeco_fast.nucleus_width_loss(t, x.double(), **o), T
        )


def test_compiles_without_a_break():
    x, T = make(3, 50)
    T.requires_grad_()
    compiled = torch.compile(
        lambda t: autodeco_fast.nucleus_width_loss(t, x, backend="torch"),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled(T).backward()
    torch.testing.assert_close(compiled(T), autodeco_fast.nucleus_width_loss(T, x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_p": 1.0}, r"min_p must be in \(0, 1\), got 1.0"),
        ({"gravity": -1.0}, "gravity must be in"),
        ({"softcap": 0.0}, r"softcap must be in \(0, 1e30\], or None, got 0"),
        ({"row_weight": torch.ones(2)}, r"row_weight must be \[3\], got shape \(2,\)"),
        ({"unreachable": "x"}, "unreachable must be one of 'drop', 'clip', got 'x'"),
        ({"max_temperature": 0.0}, "max_temperature must be in"),
        ({"reduction": "x"}, "reduction must be one of 'mean', 'sum', 'none', got 'x'"),
    ],
)
def test_says_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        autodeco_fast.nucleus_width_loss(torch.ones(3), torch.ones(3, 5), **options)
    with pytest.raises(ValueError, match=words):
        autodeco_fast.linear_nucleus_width_loss(
            torch.ones(3), torch.ones(3, 4), torch.ones(5, 4), **options
        )


def test_fp64_stays_fp64():
    x, T = make(4, 300)
    x[1, ::2] = -INF
    got = autodeco_fast.nucleus_width_loss(T.double(), x.double(), reduction="none", softcap=9.0)
    want = reference(T.double(), x, softcap=9.0)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
