"""A hostile user of the statistics and losses: every call is served as the fp64 reference, or
refused in one line."""

import math

import pytest
import torch
from hypothesis import strategies as st

import autodeco_fast as af
from tests.hostile import (
    FORMS,
    anything,
    logits_of,
    mostly,
    number,
    search,
    served,
    tensor,
    vector,
)
from tests.on_device import DEVICE
from tests.reference.stats import reference as stats_reference

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not looked at")
INF, TINY, HIGHEST = float("inf"), torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@st.composite
def stats_calls(draw):
    N, V = draw(st.integers(0, 3)), draw(st.sampled_from([1, 5, 40]))
    target = torch.tensor(
        [
            draw(mostly(st.integers(0, V - 1), st.sampled_from([-100, -1, V, 2**40])))
            for _ in range(N)
        ]
    )
    target = draw(mostly(st.just(target.long()), anything(N)))
    T = mostly(st.just(torch.linspace(0.2, 1.7, N)), anything(N))
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "temperature": T,
                "min_p": mostly(st.floats(0, 1), anything(N)),
                "logit_scale": mostly(st.floats(-2, 2), anything(N)),
                "softcap": mostly(st.floats(1, 50), anything(N)),
                "ignore_index": mostly(st.just(-100), anything(N)),
            },
        )
    )
    rest = {
        "fused": draw(st.sampled_from([True, False, None])),
        "chunk_bytes": draw(mostly(st.integers(1, 999), anything(N))),
    }
    return N, V, target, options, rest, draw(FORMS)


def stats_odd(N: int, V: int, target, options: dict) -> set[str]:
    odd = set()
    ignore = options.get("ignore_index", -100)
    if number(ignore, -(2**63), 2**63 - 1, True) is None:
        odd.add("ignore_index")
    else:
        dense = isinstance(target, torch.Tensor) and target.layout == torch.strided
        fits = dense and target.shape == (N,) and target.dtype == torch.int64
        if not fits or not all(0 <= y < V or y == ignore for y in target.tolist()):
            odd.add("target")
    for name, low, high in (
        ("min_p", 0, 1),
        ("logit_scale", -HIGHEST, HIGHEST),
        ("softcap", TINY, 1e30),
    ):
        value = options.get(name)
        if (
            name in options
            and number(value, low, high, False) is None
            and (value is not None or name == "logit_scale")
        ):
            odd.add(name)
    T = options.get("temperature")
    if T is not None and not vector(T, N):
        odd.add("temperature")
    if T is None and options.get("min_p") is not None:
        odd.add("min_p")
    return odd


def check_stats(stats, x, target, options: dict, error: float) -> None:
    """Against fp64 where numbers stay in the range of fp32."""
    scale, cap = (
        float(options[n]) if options.get(n) is not None else d
        for n, d in (("logit_scale", 1.0), ("softcap", None))
    )
    if abs(scale) > 1e4 or abs(scale) < 1e-4 or (cap is not None and cap < 1e-2):
        return
    T, min_p = options.get("temperature"), options.get("min_p")
    y = torch.where(target == options.get("ignore_index", -100), -100, target)
    odd_T = torch.zeros(len(y), dtype=torch.bool) if T is None else ~(T.detach().double() <= 1e4)
    T = None if T is None else T.detach().double().clamp(min=0.01).masked_fill(odd_T, 1.0)
    want = stats_reference(x, y, scale, cap, T)
    size = float(abs(scale) * x.abs().max()) + 1 if x.numel() else 1.0
    for name, got, exact in zip(stats._fields, stats, want):
        if name in ("argmax", "rank", "temperature"):
            continue
        fine = ~odd_T if name.startswith("scaled") else torch.ones_like(odd_T)
        step = error * size * (1 if T is None or not name.startswith("scaled") else 1 / T[fine])
        assert ((got.detach().double() - exact)[fine].abs() <= step).all(), name
        if name.startswith("scaled"):
            assert got[odd_T & (y != -100)].isnan().all(), name
    assert stats.rank.tolist() == [
        -1 if ignored else r for ignored, r in zip(y == -100, stats.rank.tolist())
    ]
    assert (stats.rank[y != -100] >= 0).all()
    if stats.kept is not None and T is not None and min_p:
        z = x.double() * scale
        z = z if cap is None else cap * torch.tanh(z / cap)
        raw = torch.where(
            options["temperature"].detach() < 1e-3, 0.0, options["temperature"].detach().double()
        )
        cut = z.amax(-1) + raw * math.log(float(min_p))
        low, high = ((z >= (cut + d)[:, None]).sum(-1) for d in (size * 1e-5, -size * 1e-5))
        fine = ~odd_T & (y != -100)
        assert ((low <= stats.kept) & (stats.kept <= high))[fine].all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logit_stats(backend):
    def check(given):
        N, V, target, options, _, form = given
        x = logits_of(N, V, torch.float32, form, [], 3.0)
        odd = stats_odd(N, V, target, options)
        stats = served(lambda: af.logit_stats(x, target, **options, backend=backend), odd)
        if stats is not None:
            check_stats(stats, x.detach(), target, options, 1e-5)

    search(stats_calls(), check, 120 if backend == "torch" else 25)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_token_stats(backend):
    def check(given):
        N, V, target, options, rest, form = given
        h, w = (
            logits_of(N, 8, torch.float32, form, [], 1.0),
            logits_of(V, 8, torch.float32, form, [], 1.0),
        )
        odd = stats_odd(N, V, target, options)
        if number(rest["chunk_bytes"], 1, 2**63 - 1, True) is None:
            odd.add("chunk_bytes")
        stats = served(
            lambda: af.token_stats(h, w, target, **options, **rest, backend=backend), odd
        )
        if stats is not None:
            check_stats(stats, h.detach().double() @ w.detach().double().T, target, options, 1e-5)

    search(stats_calls(), check, 100 if backend == "torch" else 15)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_losses(backend):
    N = 3
    stats = af.TokenStats(
        torch.tensor([4.0, 5.0, 6.0]), torch.zeros(3).long(), torch.tensor([3.0, 1.0, 6.0]),
        torch.tensor([5.0, 6.0, 7.0]), torch.tensor([1, 2, 0]), torch.ones(3),
    )  # fmt: skip
    hinge = {
        "min_p": mostly(st.floats(0.01, 0.9), anything(N)),
        "gravity": mostly(st.floats(0, 1), anything(N)),
        "power": mostly(st.sampled_from([1, 2]), anything(N)),
        "max_temperature": mostly(st.floats(0.1, 5), anything(N)),
        "unreachable": mostly(st.sampled_from(["drop", "clip"]), anything(N)),
        "reduction": mostly(st.sampled_from(["mean", "sum", "none"]), anything(N)),
        "weight": mostly(st.just(torch.tensor([1.0, 0.5, 2.0])), anything(N)),
    }
    T = mostly(
        st.just(torch.tensor([0.3, 0.9, 1.7])),
        st.one_of(anything(N), st.just(tensor((3,), torch.float32, [0.4], "strided"))),
    )

    def check(given):
        temperature, options, given_stats = given
        odd = set() if isinstance(given_stats, af.TokenStats) else {"stats"}
        if not vector(temperature, N):
            odd.add("temperature")
        weight = options.get("weight")
        if weight is not None and not vector(weight, N):
            odd.add("weight")
        for name, low, high in (
            ("min_p", 5e-324, 1 - 2**-53),
            ("gravity", 0, HIGHEST),
            ("max_temperature", TINY, HIGHEST),
        ):
            if name in options and number(options[name], low, high, False) is None:
                odd.add(name)
        for name, choices in (
            ("power", (1, 2)),
            ("unreachable", ("drop", "clip")),
            ("reduction", ("mean", "sum", "none")),
        ):
            value = options.get(name, choices[0])
            if not isinstance(value, str | int) or value not in choices:
                odd.add(name)
        if (
            backend == "triton"
            and vector(temperature, N)
            and temperature.dtype == torch.float64
            and not odd
        ):
            odd.add("backend='triton'")
        loss = served(
            lambda: af.min_p_hinge_loss(temperature, given_stats, **options, backend=backend), odd
        )
        if loss is None:
            return
        T = temperature.detach().double()
        w = torch.ones(3) if weight is None else weight.detach().double()
        need = (stats.max_logit - stats.target_logit).double() / -math.log(
            float(options.get("min_p", 0.1))
        )
        largest, gravity, power = (
            float(options.get("max_temperature", 2.0)),
            float(options.get("gravity", 0.1)),
            options.get("power", 1),
        )
        if not (
            1e-30 < largest < 1e30
            and gravity < 1e30
            and T.abs().max() < 1e10
            and w.abs().max() < 1e10
        ):
            return
        clip = options.get("unreachable", "drop") == "clip"
        if ((need - largest).abs() < 1e-5 * need).any() or (need > 1e30).any():
            return
        kept = torch.ones(3, dtype=torch.bool) if clip else need <= largest
        rows = torch.where(
            kept, w * ((need.clamp(max=largest) - T).clamp(min=0) ** power + gravity * T), 0.0
        )
        mass = torch.where(kept, w, 0.0).sum()
        how = options.get("reduction", "mean")
        want = rows if how == "none" else rows.sum() / (mass if how == "mean" and mass > 0 else 1)
        torch.testing.assert_close(
            loss.double(), want, rtol=1e-4, atol=1e-4 * float(rows.abs().max() + 1e-3)
        )

    given_stats = mostly(st.just(stats), anything(N))
    search(
        st.tuples(T, st.fixed_dictionaries({}, optional=hinge), given_stats),
        check,
        120 if backend == "torch" else 60,
    )


def test_the_other_losses():
    N = 3
    h, w, y = torch.randn(N, 8), torch.randn(20, 8), torch.tensor([0, -100, 5])
    stats = af.token_stats(h, w, y, temperature=torch.ones(N))
    unit = (0, 1, False)
    calls = {
        "easy_drop": (
            lambda v: af.autodeco_temperature_loss(torch.ones(N), stats, easy_drop=v),
            unit,
        ),
        "steepness": (
            lambda v: af.soft_top_p_loss(h, w, y, torch.ones(N), torch.ones(N), steepness=v),
            (0, HIGHEST, False),
        ),
        "chunk_bytes": (
            lambda v: af.soft_top_p_loss(h, w, y, torch.ones(N), torch.ones(N), chunk_bytes=v),
            (1, 2**63 - 1, True),
        ),
        "easy_fraction": (lambda v: af.goldilocks_mask(stats, easy_fraction=v), unit),
        "trivial_prob": (lambda v: af.goldilocks_mask(stats, trivial_prob=v), unit),
        "max_rank": (lambda v: af.goldilocks_mask(stats, max_rank=v), (0, 2**63 - 1, True)),
        "min_p": (lambda v: af.required_temperature(stats, v), (5e-324, 1 - 2**-53, False)),
    }
    rows = {
        "temperature": lambda v: af.soft_top_p_loss(h, w, y, v, torch.ones(N)),
        "top_p": lambda v: af.soft_top_p_loss(h, w, y, torch.ones(N), v),
        "uniform": lambda v: af.goldilocks_mask(stats, uniform=v),
    }

    def check(given):
        name, value = given
        if name in rows:
            odd = set() if vector(value, N) or (name == "uniform" and value is None) else {name}
            served(lambda: rows[name](value), odd)
        else:
            call, limits = calls[name]
            served(lambda: call(value), {name} if number(value, *limits) is None else set())

    search(st.tuples(st.sampled_from([*calls, *rows]), anything(N)), check, 200)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_hinge_without_labels(backend):
    N = 3
    h, w, T = torch.randn(N, 8), torch.randn(20, 8), torch.rand(N)
    numbers = {
        "min_p": (5e-324, 1 - 2**-53, False),
        "gravity": (0, HIGHEST, False),
        "max_temperature": (TINY, HIGHEST, False),
        "logit_scale": (-HIGHEST, HIGHEST, False),
        "softcap": (TINY, 1e30, False),
        "chunk_bytes": (1, 2**63 - 1, True),
    }

    def check(given):
        name, value = given
        may_be_none = value is None and name in ("softcap", "row_weight")
        if name in numbers:
            good = number(value, *numbers[name]) is not None
        else:
            good = vector(value, N)
        options = {"temperature": T, name: value}
        odd = set() if good or may_be_none else {name}
        call = af.linear_nucleus_width_loss
        served(lambda: call(hidden=h, weight=w, backend=backend, **options), odd)

    names = st.sampled_from([*numbers, "temperature", "row_weight"])
    search(st.tuples(names, anything(N)), check, 120 if backend == "torch" else 40)
