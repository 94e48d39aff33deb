"""A hostile user of the samplers: every call is served as the fp64 reference, or refused in one
line."""

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
)
from tests.on_device import DEVICE

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
