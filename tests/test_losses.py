"""Hinge, required temperature and selection against plain fp64 formulas, on both backends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeco_fast import TokenStats, goldilocks_mask, required_temperature
from autodeco_fast.torch_backend import min_p_hinge
from tests.on_device import logit_stats, min_p_hinge_loss


def stats_of(gap: torch.Tensor, rank: torch.Tensor | None = None) -> TokenStats:
    zero = torch.zeros_like(gap)
    rank = torch.ones(len(gap), dtype=torch.long) if rank is None else rank
    return TokenStats(gap, zero.long(), zero, gap, rank, zero)


def reference(T, gap, rank, min_p, gravity, power, unreachable, weight, reduction):
    need = gap.double() / -math.log(min_p)
    kept = (rank >= 0) & ((need <= 2.0) | (unreachable == "clip"))
    w = torch.where(kept, torch.ones_like(need) if weight is None else weight.double(), 0.0)
    rows = w * ((need.clamp(max=2.0) - T).clamp(min=0) ** power + gravity * T)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (w.sum() if w.sum() > 0 else 1.0)


@settings(max_examples=60)
@given(
    st.integers(1, 2100) | st.sampled_from([4096, 4097, 9000]),
    st.sampled_from([1, 2]),
    st.sampled_from(["drop", "clip"]),
    st.sampled_from(["mean", "sum", "none"]),
    st.booleans(),
    st.sampled_from(["torch", "triton"]),
)
def test_value_and_gradient(N, power, unreachable, reduction, weighted, backend):
    g = torch.Generator().manual_seed(N)
    T = torch.rand(N, generator=g) * 2
    gap = torch.rand(N, generator=g) * 6
    rank = torch.randint(-1, 3, (N,), generator=g)
    weight = torch.rand(N, generator=g) if weighted else None
    upstream = torch.rand(N if reduction == "none" else (), generator=g)
    ours, exact = T.clone().requires_grad_(), T.double().requires_grad_()
    options = dict(
        min_p=0.1,
        gravity=0.2,
        power=power,
        unreachable=unreachable,
        weight=weight,
        reduction=reduction,
    )
    loss = min_p_hinge_loss(ours, stats_of(gap, rank), **options, backend=backend)
    want = reference(exact, gap, rank, **options)
    torch.testing.assert_close(loss.double(), want, rtol=3e-6, atol=1e-6)
    (loss * upstream).sum().backward()
    (want * upstream.double()).sum().backward()
    # λ − 2(T* − T) can cancel: a few roundings of its terms, which are below 4
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("power", [1, 2])
def test_loops_and_torch_agree(power, clip):
    """On numbers of all kinds, NaN, infinities and zero weights among them."""
    g = torch.Generator().manual_seed(0)
    some = torch.tensor([0.0, -0.0, 1.0, 4.605170, torch.nan, torch.inf, -torch.inf, 3e38])
    T, gap, weight = (some[torch.randint(len(some), (5000,), generator=g)] for _ in range(3))
    rank = torch.randint(-1, 3, (5000,), generator=g)
    for w in (None, weight):
        arguments = T, gap, rank, w, 0.4342945, 0.1, power, 2.0, clip
        ours, theirs = min_p_hinge._compiled(*arguments), min_p_hinge._in_torch(*arguments)
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_all_ignored_is_zero(backend):
    T = torch.rand(5, requires_grad=True)
    loss = min_p_hinge_loss(T, stats_of(torch.rand(5), torch.full((5,), -1)), backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert T.grad.tolist() == [0] * 5


def test_is_the_pinball_loss():
    """relu(T* − T) + λT = pinball_{1−λ}(T*, T) + λT*."""
    T, gap, gravity = torch.rand(50) * 2, torch.rand(50) * 4, 0.3
    stats = stats_of(gap)
    need = required_temperature(stats, 0.1)
    pinball = torch.where(need > T, (1 - gravity) * (need - T), gravity * (T - need))
    loss = min_p_hinge_loss(T, stats, gravity=gravity, reduction="none")
    torch.testing.assert_close(loss, pinball + gravity * need)


def test_gradcheck():
    T = (torch.rand(8, dtype=torch.float64) * 2).requires_grad_()
    stats = stats_of(torch.rand(8) * 4)
    for power in (1, 2):
        assert torch.autograd.gradcheck(
            lambda t, p=power: min_p_hinge_loss(t, stats, power=p, backend="torch"), T
        )


def test_a_second_derivative_is_refused(backend):
    T = torch.full((3,), 0.5, requires_grad=True)
    loss = min_p_hinge_loss(T, stats_of(torch.tensor([1.0, 2.0, 3.0])), power=2, backend=backend)
    (slope,) = torch.autograd.grad(loss, T, create_graph=True)
    assert not slope.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()


def test_compiles_without_a_break():
    stats = stats_of(torch.rand(8))
    T = torch.rand(8, requires_grad=True)
    compiled = torch.compile(
        lambda t: min_p_hinge_loss(t, stats, backend="torch"), fullgraph=True, backend="aot_eager"
    )
    compiled(T).backward()
    torch.testing.assert_close(compiled(T), min_p_hinge_loss(T, stats))


def test_required_temperature_keeps_the_target():
    z = torch.randn(200, 50) * 3
    y = torch.randint(0, 50, (200,))
    need = required_temperature(logit_stats(z, y), 0.1)
    for factor, inside in ((1.001, True), (0.999, False)):
        T = (need * factor).clamp(min=1e-6)[:, None]
        p = (z.double() / T).softmax(-1)
        kept = (p >= 0.1 * p.amax(-1, keepdim=True)).gather(1, y[:, None])[:, 0]
        assert (kept[need > 0] == inside).all()


def test_goldilocks():
    rank = torch.tensor([-1, 0, 0, 5, 200])
    stats = TokenStats(
        *torch.zeros(4, 5)[:1],
        rank,
        torch.tensor([0.0, -0.01, -2.0, -3.0, -9.0]),
        torch.zeros(5),
        rank,
        rank,
    )
    assert goldilocks_mask(stats, easy_fraction=0.0).tolist() == [False, False, True, True, False]
    assert goldilocks_mask(stats, easy_fraction=1.0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_p": 1.0}, "min_p must be in"),
        ({"power": 3}, "power must be one of"),
        ({"reduction": "x"}, "reduction must be"),
        ({"gravity": -1.0}, "gravity must be"),
        ({"weight": torch.ones(2)}, r"weight must be \[3\]"),
    ],
)
def test_says_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        min_p_hinge_loss(torch.ones(3), stats_of(torch.ones(3)), **options)
