"""What the samplers take as parameters: numbers and tensors of any type, checked on a CPU, reported
by status 8 elsewhere."""

import decimal
import fractions

import numpy as np
import pytest
import torch

from autodeco_fast import TemperatureHead, linear_sample, merge_samples, sample, sample_partial
from autodeco_fast.backends import implementation
from autodeco_fast.ops.checks import check_seed
from autodeco_fast.ops.sample import checked_parameters
from autodeco_fast.sampling import CANDIDATE, FULL_LOGPROB, KEPT, LOGPROB, SamplingParameters
from tests.on_device import DEVICE, on_device
from tests.refusals import one_line

NAN, INF = float("nan"), float("inf")
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not looked at")
WRONG = {
    "temperature": [NAN, INF, -0.1, 2e29],
    "min_p": [NAN, INF, -0.1, 1.001],
    "top_p": [NAN, -0.1, 0.0, 1.001],
    "top_k": [-1, 2**31],
    "position": [-1, 2**32],
    "stream": [-1, 2**32],
}
PAIRS = [(name, value) for name, values in WRONG.items() for value in values]


def logits(B: int, V: int = 300) -> torch.Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(B)) * 3


def samplers(z: torch.Tensor, backend: str | None = None):
    """(name, call) of every sampler that takes these parameters; all draw from z."""
    eye = torch.eye(z.shape[1])
    both = {"seed": 3, "backend": backend}
    yield "sample", lambda T=0.9, **o: sample(z, T, **{**both, **o}).token
    for fused in (True, False):
        yield (
            "linear_sample",
            lambda T=0.9, f=fused, **o: linear_sample(z, eye, T, fused=f, **{**both, **o}).token,
        )
    yield (
        "sample_partial",
        lambda T=0.9, **o: sample_partial(z, T, first_id=0, **{**both, **o}).token,
    )


def takes(sampler: str, name: str) -> bool:
    return sampler == "sample" or name not in ("top_k", "top_p")


@pytest.mark.parametrize("name", ["min_p", "top_k", "top_p"])
def test_none_cuts_nothing(name, backend):
    z = logits(3, 40)
    for sampler, draw in samplers(z, backend):
        if takes(sampler, name):
            assert torch.equal(draw(**{name: None}), draw())
    part = sample_partial(z, 0.9, first_id=0, seed=3, min_p=None)
    assert torch.equal(merge_samples([part], 0.9, min_p=None)[0], sample(z, 0.9, seed=3).token)


@pytest.mark.parametrize(
    "kind", [np.float16, np.float32, np.float64, fractions.Fraction, decimal.Decimal, torch.tensor]
)
def test_any_real_number(kind, backend):
    z = logits(3, 40)
    for _, draw in samplers(z, backend):
        assert torch.equal(draw(kind(0.5), min_p=kind(0.25)), draw(0.5, min_p=0.25))
    assert torch.equal(
        sample(z, 1.0, top_p=kind(0.75), seed=3).token, sample(z, 1.0, top_p=0.75, seed=3).token
    )


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint64, torch.tensor])
def test_any_integer(kind, backend):
    z = logits(3, 40)
    for _, draw in samplers(z, backend):
        given = [{"position": of(5), "stream": of(7), "seed": of(9)} for of in (kind, int)]
        assert torch.equal(draw(kind(2), **given[0]), draw(2.0, **given[1]))
    assert torch.equal(
        sample(z, 1.0, top_k=kind(3), seed=3).token, sample(z, 1.0, top_k=3, seed=3).token
    )


@on_cpu
@pytest.mark.parametrize(("name", "value"), PAIRS)
@pytest.mark.parametrize("form", ["number", "numpy", "scalar tensor", "row"])
def test_values_out_of_range_are_refused(name, value, form, backend):
    z, whole = logits(3, 40), isinstance(value, int)
    kind = torch.int64 if whole else torch.float32
    good = {"top_p": 0.5, "temperature": 0.5, "min_p": 0.5}.get(name, 1)
    given = {
        "number": value,
        "numpy": (np.int64 if whole else np.float32)(value),
        "scalar tensor": torch.tensor(value, dtype=kind),
        "row": torch.tensor([good, value, good], dtype=kind),
    }[form]
    for sampler, draw in samplers(z, backend):
        if takes(sampler, name):
            one_line(
                lambda d=draw: d(**{"T" if name == "temperature" else name: given}),
                f"{name} must be in ",
                "got ",
            )
    if name in ("temperature", "min_p"):
        part = sample_partial(z, 0.9, first_id=0, seed=3)
        T, min_p = (given, 0.1) if name == "temperature" else (0.9, given)
        one_line(lambda: merge_samples([part], T, min_p=min_p), f"{name} must be in ")


def test_names_the_value_and_the_range():
    z, T = logits(3), torch.tensor([0.5, NAN, 0.5])
    one_line(lambda: sample(z, T, seed=0), "temperature must be in [0, 1e29], got nan")
    one_line(lambda: sample(z, 1.0, min_p=1.5, seed=0), "min_p must be in [0, 1], got 1.5")
    one_line(
        lambda: sample(z, 1.0, top_p=torch.tensor(0.0), seed=0), "top_p must be in (0, 1], got 0.0"
    )
    one_line(
        lambda: sample(z, 1.0, top_k=10**5000, seed=0),
        "top_k must be in [0, 2**31), got a number of thousands of digits",
    )
    one_line(
        lambda: sample(z, fractions.Fraction(10**400), seed=0), "temperature must be in [0, 1e29]"
    )


@pytest.mark.parametrize(
    "name", ["temperature", "min_p", "top_p", "top_k", "position", "stream", "seed"]
)
def test_what_is_no_number_is_refused(name):
    z = logits(3)
    wrong = [
        "1",
        True,
        [1],
        1j,
        object(),
        np.ones(3),
        torch.ones(3, dtype=torch.bool),
        torch.ones(2),
        torch.ones(3, 1),
        torch.ones(3).to_sparse(),
    ]
    wrong += [] if name in ("top_k", "top_p", "min_p", "stream") else [None]
    wrong += (
        [torch.ones(3), 1.0, np.float32(1), decimal.Decimal(1)]
        if name not in ("temperature", "min_p", "top_p")
        else []
    )
    for value in wrong:
        options = {"temperature": 0.9, "seed": 3, name: value}
        one_line(lambda o=options: sample(z, **o), f"{name} must be ")


# Below the host's check: what a GPU's rows get, and a CPU's where nobody looks.


def parameters(T, min_p, **cuts) -> SamplingParameters:
    return SamplingParameters(T, min_p, **cuts, seed=5, position=2, stream=None)


def below(name: str, z: torch.Tensor, backend: str, want: int):
    """The sampler under the checks, on parameters by row."""
    if name == "sample":
        call = implementation(backend, "sample")
        return lambda T, min_p, **cuts: on_device(call)(z, parameters(T, min_p, **cuts), want=want)
    call = implementation(backend, "linear_sample")
    eye = torch.eye(z.shape[1])
    return lambda T, min_p: on_device(call)(
        z, eye, None, 1.0, None, parameters(T, min_p), want=want
    )


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        *(("sample", name) for name in ("temperature", "min_p", "top_p", "top_k")),
        *(("linear_sample", name) for name in ("temperature", "min_p")),
    ],
)
def test_rows_that_nobody_looked_at_get_status_8(sampler, name, backend):
    values = WRONG[name]
    if backend == "triton" and name in ("top_p", "top_k"):
        values = values[:2]  # slow in the interpreter
    B = 3 * len(values) + 1
    z, broken = logits(B, 60), {}
    if sampler == "sample":  # in a product one NaN makes a row of them
        z[2, 5], z[5, 7], z[B - 1] = NAN, INF, -INF
        broken = {2: 1, 5: 2, B - 1: 4}
    odd = torch.arange(B) % 3 == 1
    rows = {"temperature": torch.full((B,), 0.9), "min_p": torch.full((B,), 0.05)}
    rows["temperature"][3] = 0.0
    if name in ("top_p", "top_k"):
        rows |= {"top_p": torch.full((B,), 0.9), "top_k": torch.full((B,), 20)}
    want = FULL_LOGPROB | (LOGPROB | KEPT if sampler == "sample" else 0)

    def run(r):
        return below(sampler, z, backend, want)(
            r["temperature"], r["min_p"], **dict(list(r.items())[2:])
        )

    clean = run(rows)
    assert clean.status.tolist() == [broken.get(i, 0) for i in range(B)]
    rows[name][odd] = torch.tensor(values, dtype=rows[name].dtype)
    if broken:
        z[1, 9] = NAN  # a broken row with a wrong parameter says both
    out = run(rows)
    for name, got in out._asdict().items():
        if got is None:
            continue
        assert torch.equal(got[~odd], getattr(clean, name)[~odd]), name
        if name != "status":
            assert got[odd].tolist() == [0] * len(values), name
    assert out.status[odd].tolist() == [9 if broken and i == 0 else 8 for i in range(len(values))]


def test_the_bounds_are_those_of_the_host(backend):
    """At the ends of the ranges rows are served, one step beyond they are not."""

    def step(x, to):
        return float(np.nextafter(np.float32(x), np.float32(to)))

    T = torch.tensor([0.0, 1e29, step(1e29, INF), step(0, -1), 1.0, 1.0, 1.0])
    min_p = torch.tensor([0.5, 0.0, 0.0, 0.0, 1.0, step(1, 2), step(0, -1)])
    z = logits(7, 60)
    out = below("sample", z, backend, 0)(T, min_p)
    assert out.status.tolist() == [0, 0, 8, 8, 0, 8, 8]
    top_p = torch.tensor(
        [1.0, float(torch.finfo(torch.float32).tiny), step(1, 2), 0.0, 1.0, 1.0, 1.0]
    )
    top_k = torch.tensor([0, 2**31 - 1, 1, 1, 2**31, -1, 1])
    out = below("sample", z, backend, 0)(torch.ones(7), torch.zeros(7), top_p=top_p, top_k=top_k)
    assert out.status.tolist() == [0, 0, 8, 8, 8, 8, 0]


@pytest.mark.parametrize("known", [INF, NAN])
def test_a_maximum_that_is_none(known, backend):
    z, maximum = logits(2, 40), torch.tensor([known, -INF])
    run = on_device(implementation(backend, "sample"))
    of_rows = parameters(torch.ones(2), torch.full((2,), 0.1))
    out = run(z, of_rows, known_maximum=maximum, want=CANDIDATE)
    assert out.status.tolist() == [8, 0]
    if DEVICE == "cpu":
        one_line(
            lambda: sample_partial(z, 1.0, first_id=0, seed=0, maximum=maximum),
            f"maximum must be below inf, got {known}",
        )


def test_compiled_rows_are_not_looked_at():
    z, T = logits(3), torch.tensor([0.9, NAN, 0.9])

    def call(T):
        return sample(z, T, min_p=0.1, seed=4, backend="torch")

    out = torch.compile(call, fullgraph=True, backend="aot_eager")(T)
    assert out.status.tolist() == [0, 8, 0]
    assert out.token.tolist() == [
        *call(torch.tensor([0.9, 0.5, 0.9])).token[:1].tolist(),
        0,
        out.token[2].item(),
    ]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_of_one_number_is_that_number(shape):
    """So a GPU's call neither copies it nor runs another variant of a kernel."""
    given = {
        "temperature": 0.5,
        "min_p": 0.25,
        "top_k": 7,
        "top_p": 0.5,
        "seed": 2**63,
        "position": 3,
    }
    tensors = {
        **{n: torch.full(shape, v) for n, v in given.items() if n != "seed"},
        "seed": torch.full(shape, 2**63, dtype=torch.uint64),
    }
    plain, ours = (
        checked_parameters(3, torch.device("cuda"), stream=None, **some)
        for some in (given, tensors)
    )
    assert ours == plain
    assert not any(isinstance(x, torch.Tensor) for x in ours)


# Seeds


def test_one_rule_for_seeds(backend):
    z = logits(3, 40)
    assert [
        check_seed(s)
        for s in (0, -(2**63), 2**63 - 1, 2**63, 2**64 - 1, np.uint64(2**64 - 1), np.int8(-3))
    ] == [
        *(0, -(2**63), 2**63 - 1, -(2**63), -1, -1, -3),
    ]
    for _, draw in samplers(z, backend):
        assert torch.equal(draw(seed=2**64 - 1), draw(seed=-1))
        assert torch.equal(draw(seed=torch.tensor(2**64 - 1, dtype=torch.uint64)), draw(seed=-1))
        assert not torch.equal(draw(seed=-1, T=3.0), draw(seed=1, T=3.0))
        for seed in (2**64, -(2**63) - 1, 10**30):
            one_line(lambda d=draw, s=seed: d(seed=s), "seed must be in [-2**63, 2**64), got ")
        for seed in (1.0, "1", True, None, np.float32(1), np.bool_(True), [1], 1j):
            one_line(
                lambda d=draw, s=seed: d(seed=s), "seed must be an integer in [-2**63, 2**64), got "
            )
        for seed in (torch.ones(3), torch.ones(3, dtype=torch.bool)):
            one_line(lambda d=draw, s=seed: d(seed=s), "seed must be integers, got ")
        one_line(
            lambda d=draw: d(seed=torch.zeros(2, dtype=torch.int64)),
            "seed must be a scalar or [3], got shape (2,)",
        )


# Autograd


def test_draws_under_autograd(backend):
    z = logits(3, 40)
    head = TemperatureHead(40)
    T = head(z)
    for _, draw in samplers(z.clone().requires_grad_(), backend):
        token = draw(T, min_p=T * 0.1)
        assert not token.requires_grad
        assert torch.equal(token, draw(T.detach(), min_p=T.detach() * 0.1))
    compiled = torch.compile(
        lambda z: sample(z, head(z), seed=3, backend="torch").token,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(z.clone().requires_grad_()), sample(z, T, seed=3).token)
    part = sample_partial(z, T, first_id=0, seed=3)
    assert torch.equal(merge_samples([part], T)[0], sample(z, T, seed=3).token)
