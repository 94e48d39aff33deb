"""What is broken on its way in is seen in what comes out, on either backend: NaN stays NaN, and a
target that is no token of the vocabulary has no probability."""

import pytest
import torch

import autodeco_fast as af
from autodeco_fast import TokenStats
from autodeco_fast.ops import checks
from tests.memory_guard import guarded
from tests.on_device import (
    DEVICE,
    logit_stats,
    min_p_hinge_loss,
    prob_stats,
    temperature_head,
    token_stats,
)

NAN = float("nan")
N, H, V, F = 5, 32, 300, 20
SEEN = ("max_logit", "logsumexp", "entropy", "gap")
SCALED = ("scaled_logsumexp", "scaled_entropy", "scaled_log_mass", "scaled_log_prob")


def rows_of_nan(stats: TokenStats, names: tuple[str, ...]) -> set[tuple[int, ...]]:
    """The rows where each of these fields is NaN."""
    found = {tuple(getattr(stats, n).detach().isnan().nonzero()[:, 0].tolist()) for n in names}
    finite = stats.max_logit.isfinite()
    assert all(getattr(stats, n).detach()[finite].isfinite().all() for n in names)
    return found


def given() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a weight, targets and temperatures."""
    return torch.randn(N, H), torch.randn(V, H), torch.arange(N), torch.linspace(0.3, 1.5, N)


@pytest.mark.parametrize("cut", [False, True])
def test_a_logit(cut, backend):
    """Whether it is the target's or not."""
    hidden, weight, target, T = given()
    z = hidden @ weight.T
    z[1, 200], z[2, 2], z[4] = NAN, NAN, NAN
    stats = logit_stats(z, target, temperature=T, min_p=0.1, cut=cut, backend=backend)
    assert rows_of_nan(stats, SEEN) == {(1, 2, 4)}
    if not cut:
        assert rows_of_nan(stats, SCALED) == {(1, 2, 4)}


def test_a_logit_of_the_top_p_head_s(backend):
    """Nor are there probabilities where nothing is finite, or at a temperature that is none."""
    z, T = torch.randn(N, V), torch.ones(N)
    z[1, 200], z[2], T[4] = NAN, -float("inf"), NAN
    for numbers in prob_stats(z, T, backend=backend):
        assert numbers.isnan().tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("broken", ["hidden", "weight"])
def test_a_product(broken, fused, backend):
    hidden, weight, target, T = given()
    (hidden[3] if broken == "hidden" else weight[200])[7] = NAN
    stats = token_stats(hidden, weight, target, temperature=T, fused=fused, backend=backend)
    rows = (3,) if broken == "hidden" else (0, 1, 2, 3, 4)
    assert rows_of_nan(stats, SEEN + SCALED) == {rows}


@pytest.mark.parametrize("cut", [False, True])
def test_a_temperature(cut, backend):
    hidden, weight, target, T = given()
    T[2] = NAN
    options = {"temperature": T, "min_p": 0.1, "cut": cut, "backend": backend}
    stats = logit_stats(hidden @ weight.T, target, **options)
    assert rows_of_nan(stats, SEEN) == {()}
    for name in SCALED:
        assert getattr(stats, name).isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("broken", ["hidden", "w1", "b1", "w2", "b2"])
@pytest.mark.parametrize("n", [2, 70])
def test_a_head(n, broken, backend):
    """Of one row and of many: they have kernels of their own."""
    shapes = {"hidden": (n, H), "w1": (F, H), "b1": (F,), "w2": (1, F), "b2": (1,)}
    given = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    given[broken].view(-1)[0] = NAN
    T = temperature_head(*given.values(), backend=backend)
    assert T[0].isnan()
    assert T[1:].isnan().all() == (broken != "hidden")


@pytest.mark.parametrize("broken", ["temperature", "gap"])
@pytest.mark.parametrize("unreachable", ["drop", "clip"])
@pytest.mark.parametrize("gravity", [0.0, 0.1])
def test_the_hinge(gravity, unreachable, broken, backend):
    top, rank = torch.tensor([4.0, 5.0, 6.0]), torch.tensor([1, 2, 3])
    target = torch.tensor([3.0, 3.0, 3.0])
    T = torch.tensor([0.2, 0.2, 0.2])
    (T if broken == "temperature" else top)[1] = NAN
    stats = TokenStats(top, rank, target, top, rank, target)
    options = {"gravity": gravity, "unreachable": unreachable, "backend": backend}
    rows = min_p_hinge_loss(T, stats, reduction="none", **options)
    assert rows.isnan().tolist() == [False, True, False]
    assert min_p_hinge_loss(T, stats, **options).isnan()


@pytest.fixture
def unseen(monkeypatch):
    """Values of tensors are not looked at by the host, as on a GPU."""
    monkeypatch.setattr(checks, "readable", lambda value: False)


@pytest.mark.parametrize("how", ["logits", "fused", "chunked"])
def test_a_target_that_is_no_token(how, unseen, backend):
    """Neither 2³² + 3, which is 3 in 32 bits, nor what ignored and absent targets are inside."""
    hidden, weight, target, T = given()
    target[:4] = torch.tensor([V, 2**32 + 3, -1, -2])
    options = {"temperature": T, "min_p": 0.1, "backend": backend}

    def run():
        if how == "logits":
            return logit_stats(hidden @ weight.T, target, **options)
        return token_stats(hidden, weight, target, fused=how == "fused", **options)

    if backend == "triton" and DEVICE == "cpu":
        with guarded():
            stats = run()
    else:
        stats = run()
    assert stats.gap.isposinf().tolist() == [True] * 4 + [False]
    assert stats.target_prob[:4].tolist() == [0.0] * 4
    assert stats.rank[:4].tolist() == [V] * 4
    want = logit_stats(hidden @ weight.T, torch.arange(N), **options)
    for name in ("max_logit", "logsumexp", "entropy", "scaled_entropy", "kept"):
        torch.testing.assert_close(getattr(stats, name), getattr(want, name), rtol=1e-5, atol=1e-5)


def test_the_top_p_loss_of_a_target_that_is_no_token(unseen):
    hidden, weight, target, T = given()
    target[1] = V
    rows = af.soft_top_p_loss(hidden, weight, target, T, torch.full((N,), 0.9), reduction="none")
    assert rows[1] == 0
    assert rows.isfinite().all()


@pytest.mark.parametrize("name", ["weight", "bias", "target", "temperature"])
def test_a_tensor_on_another_device(name):
    hidden, weight, target, T = given()
    tensors = {"weight": weight, "bias": torch.zeros(V), "target": target, "temperature": T}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"^{name} must be on cpu like the rest, got meta$"):
        af.token_stats(hidden, **tensors)
    if name in ("target", "temperature"):
        given_rows = {key: tensors[key] for key in ("target", "temperature")}
        with pytest.raises(ValueError, match=f"^{name} must be on cpu"):
            af.logit_stats(hidden @ weight.T, **given_rows)


def test_a_bitmask_or_maximum_on_another_device():
    z = torch.randn(2, 64)
    mask, top = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2)
    with pytest.raises(ValueError, match=r"^token_bitmask must be on cpu"):
        af.sample(z, 1.0, seed=1, token_bitmask=mask.to("meta"))
    with pytest.raises(ValueError, match=r"^maximum must be on cpu"):
        af.sample_partial(z, 1.0, seed=1, first_id=0, maximum=top.to("meta"))


def test_a_head_on_another_device():
    head = af.TemperatureHead(H).to("meta")
    with pytest.raises(ValueError, match=r"^w1 must be on cpu like the rest, got meta$"):
        head(torch.randn(2, H))
