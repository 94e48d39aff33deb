"""A hostile user of the samplers, statistics and losses: every call is served as the fp64
reference, or refused in one line."""

import math

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import autodeco_fast as af
from autodeco_fast.torch_backend.sample_loops import uniform_bits
from tests.hostile import (
    BREAKS,
    FORMS,
    REALS,
    SPREADS,
    THINGS,
    anything,
    logits_of,
    mostly,
    number,
    row,
    search,
    served,
    tensor,
    vector,
)
from tests.on_device import DEVICE
from tests.reference_stats import reference as stats_reference

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not looked at")
INF, TINY, HIGHEST = float("inf"), torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
RANGES = {  # name → low, high, whether an integer
    "temperature": (0.0, 1e29, False),
    "min_p": (0.0, 1.0, False),
    "top_p": (TINY, 1.0, False),
    "top_k": (0, 2**31 - 1, True),
    "position": (0, 2**32 - 1, True),
    "stream": (0, 2**32 - 1, True),
    "seed": (-(2**63), 2**64 - 1, True),
}
NONE = {"min_p": 0.0, "top_p": 1.0, "top_k": 0}  # what None means
ORDINARY = {
    "temperature": st.floats(0, 3),
    "min_p": st.floats(0, 1),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(0, 50),
    "position": st.integers(0, 9),
    "stream": st.integers(0, 9),
    "seed": st.integers(0, 99),
}


@st.composite
def sampler_calls(draw, widths=(1, 4, 37, 300)):
    """(B, logits or hidden, options) of a call, most of whose arguments are ordinary."""
    B, V = draw(st.integers(0, 3)), draw(st.sampled_from(widths))
    dtype = draw(
        mostly(
            st.sampled_from(REALS[:1] + REALS[2:]),
            st.sampled_from([torch.float64, torch.int64, torch.bool]),
        )
    )
    z = logits_of(B, V, dtype, draw(FORMS), draw(st.one_of(st.just([]), BREAKS)), draw(SPREADS))
    odd = st.one_of(
        st.sampled_from(THINGS),
        st.none(),
        st.just(z[0] if B else z[:, :0]),
        st.just(z.detach().to_sparse()),
    )
    logits = draw(mostly(st.just(z), odd))
    names = [
        "temperature",
        "seed",
        *draw(st.sets(st.sampled_from([n for n in RANGES if n not in ("temperature", "seed")]))),
    ]
    return B, logits, {name: draw(mostly(ORDINARY[name], anything(B))) for name in names}


def asked_of(options: dict, B: int) -> tuple[dict, set[str]]:
    """Each row's parameters, and the names of those that must be refused."""
    rows = {}
    for name, value in options.items():
        if value is None and (name in NONE or name == "stream"):
            value = NONE.get(name)
            if value is None:
                continue
        rows[name] = row(value, B, *RANGES[name])
    odd = {name for name, value in rows.items() if value is None}
    if "stream" not in rows:
        seed = options["seed"]
        by_row = isinstance(seed, torch.Tensor) and seed.shape == (B,)
        rows["stream"] = [0] * B if by_row else list(range(B))
    defaults = {**NONE, "position": 0}
    return {**{name: [value] * B for name, value in defaults.items()}, **rows}, odd


def lowest_kept(x: torch.Tensor, T: float, min_p: float, top_k: int, top_p: float) -> float:
    """The lowest logit of a row that top-k, then top-p, then Min-P keep: by logits, which differ
    where T makes p's equal."""
    z = x[x > -INF].sort(descending=True).values
    z = z[z >= z[min(top_k or len(z), len(z)) - 1]]
    weight = ((z - z[0]) / T).exp()
    above = weight.cumsum(0) - weight
    floor = float(z[above < top_p * weight.sum()].min()) if top_p < 1 else float(z[-1])
    return max(floor, float(z[0]) + T * math.log(min_p)) if min_p > 0 else floor


def check_draws(z: torch.Tensor, asked: dict, out, error: float = 0.0) -> None:
    """Each token is one of the kept, none of the kept scores more; status and status alone tells of
    broken rows."""
    z = z.detach().double()
    for b in range(len(z)):
        x, T = z[b], asked["temperature"][b]
        status = int(x.isnan().any()) + 2 * int(x.isposinf().any())
        x = torch.where(x < INF, x, -INF)
        token = int(out.token[b])
        if not x.isfinite().any():
            assert (token, int(out.status[b])) == (0, status + 4)
            continue
        assert int(out.status[b]) == status
        top = float(x.max())
        if T < 1e-3:
            assert x[token] >= top - error
            assert error or token == int((x == top).nonzero()[0])
            continue
        bits = uniform_bits(
            np.int64(np.uint64(asked["seed"][b] % 2**64).astype(np.int64)),
            np.int64(asked["position"][b]), np.int64(asked["stream"][b]), np.arange(len(x)), 0,
        )  # fmt: skip
        u = ((torch.from_numpy(bits.astype(np.int64)).double() + 0.5) * 2.0**-32).clamp(
            max=1 - 2.0**-24
        )
        score = x - T * (-torch.log1p(-u)).log()
        slack = error + 5e-6 * max(abs(top), 25 * T, 1e-30)
        cuts = [
            (asked["min_p"][b] * f, int(asked["top_k"][b]), asked["top_p"][b] / f)
            for f in (1 + slack / T, 1 / (1 + slack / T))
        ]
        sure, maybe = (x >= lowest_kept(x, T, *cut) for cut in cuts)
        assert x[token] >= min(float(x[maybe].min()), top) - slack
        if sure.any():
            assert score[token] >= score[sure].max() - 2 * slack, (b, token)


def logits_odd(logits) -> bool:
    return not (
        isinstance(logits, torch.Tensor)
        and logits.layout == torch.strided
        and logits.dim() == 2
        and logits.shape[1] > 0
        and logits.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sample(backend):
    def check(given):
        B, logits, options = given
        asked, odd = asked_of(options, B)
        if logits_odd(logits):
            odd = {"logits"}
        elif len(logits) != B:
            return
        kinds = (
            {"return_logprob": True, "return_kept": True, "return_full_logprob": True}
            if "top_k" in options
            else {}
        )
        out = served(lambda: af.sample(logits, **options, **kinds, backend=backend), odd)
        if out is not None:
            assert out.token.shape == out.status.shape == (B,)
            check_draws(logits, asked, out)

    if backend == "torch":
        search(sampler_calls(), check, 150)
    else:
        search(sampler_calls((1, 4, 37)), check, 12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_linear_sample(backend):
    products = st.fixed_dictionaries(
        {},
        optional={
            "logit_scale": mostly(st.floats(-2, 2), anything(3)),
            "softcap": mostly(st.floats(0.5, 50), anything(3)),
            "fused": st.sampled_from([True, False, None]),
            "bias": mostly(st.just(torch.linspace(-1, 1, 20)), anything(20)),
            "weight": anything(20),
        },
    )

    def check(given):
        (B, _, options), product = given
        hidden = torch.randn(B, 8, generator=torch.Generator().manual_seed(B))
        weight = product.pop(
            "weight", torch.randn(20, 8, generator=torch.Generator().manual_seed(9))
        )
        options = {n: v for n, v in options.items() if n not in ("top_k", "top_p")}
        asked, odd = asked_of(options, B)
        scale, cap = product.get("logit_scale", 1.0), product.get("softcap")
        limits = {"logit_scale": (-HIGHEST, HIGHEST), "softcap": (TINY, 1e30)}
        odd |= {
            n
            for n, v in (("logit_scale", scale), ("softcap", cap))
            if v is not None and number(v, *limits[n], False) is None
        }
        odd |= {"logit_scale"} & {n for n in product if product[n] is None}
        bias = product.get("bias")
        fits = isinstance(bias, torch.Tensor) and bias.layout == torch.strided
        if bias is not None and not (fits and bias.shape == (20,) and bias.dtype == torch.float32):
            odd |= {"bias"}
        if not (isinstance(weight, torch.Tensor) and weight.shape == (20, 8)):
            odd |= {"weight"}
        out = served(
            lambda: af.linear_sample(hidden, weight, **product, **options, backend=backend), odd
        )
        if out is None:
            return
        scale, cap = float(scale), None if cap is None else float(cap)
        z = hidden.double() @ weight.double().T + (0 if bias is None else bias.detach().double())
        if z.abs().max() * abs(scale) < 1e30 if B else False:
            z = z * scale
            z = z if cap is None or cap > 1e30 else cap * torch.tanh(z / cap)
            if (z.isfinite().all() and z.abs().max() > 1e-30) or not scale:
                check_draws(z, asked, out, error=1e-5 * float(z.abs().max()) + 1e-6 * abs(scale))

    search(
        st.tuples(sampler_calls(), products),
        check,
        100 if DEVICE == "cpu" and backend == "torch" else 12,
    )


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
        "draw": lambda v: af.goldilocks_mask(stats, draw=v),
    }

    def check(given):
        name, value = given
        if name in rows:
            odd = set() if vector(value, N) or (name == "draw" and value is None) else {name}
            served(lambda: rows[name](value), odd)
        else:
            call, limits = calls[name]
            served(lambda: call(value), {name} if number(value, *limits) is None else set())

    search(st.tuples(st.sampled_from([*calls, *rows]), anything(N)), check, 200)
