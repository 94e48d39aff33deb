"""AutoDeco's losses and features against its released formulas, written out in fp64."""

import pytest
import torch

from autodeco_fast import TopPHead, autodeco_temperature_loss, soft_top_p_loss
from autodeco_fast.losses.autodeco import learned_by_autodeco
from tests.on_device import logit_stats, prob_stats
from tests.reference.autodeco import joint_features, soft_top_p, temperature_loss

IGNORE = -100


def case(N=13, H=12, V=90, kind=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    h, w = torch.randn(N, H, generator=g, dtype=kind), torch.randn(V, H, generator=g, dtype=kind)
    y = torch.randint(0, V, (N,), generator=g)
    y[::3] = (h @ w.T).argmax(-1)[::3]  # easy ones
    y[::4] = IGNORE
    T = torch.rand(N, generator=g, dtype=kind) * 1.8 + 0.1
    P = torch.rand(N, generator=g, dtype=kind) * 0.9 + 0.05
    return h, w, y, T.requires_grad_(), P.requires_grad_()


@pytest.mark.parametrize("weighting", ["unscaled", "scaled", None])
def test_temperature_loss_is_the_released_one(weighting):
    h, w, y, T, _ = case()
    with torch.no_grad():
        T[1] = 5e-3  # clamped
    z = h @ w.T
    stats = logit_stats(z, y, temperature=T)
    ours = autodeco_temperature_loss(
        T, stats, weighting=weighting, generator=torch.Generator().manual_seed(1)
    )
    kept = learned_by_autodeco(stats, 0.6, torch.Generator().manual_seed(1))
    theirs = temperature_loss(z, T, y, kept, weighting)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for mine, exact in zip(torch.autograd.grad(ours, T), torch.autograd.grad(theirs, T)):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-9)
        assert mine[1] == 0


def test_easy_tokens_are_left_out():
    _, _, y, _, _ = case(N=4000)
    z = torch.zeros(4000, 90)
    z[torch.arange(4000), y.clamp(min=0)] = torch.where(torch.arange(4000) % 2 == 0, 1.0, -1.0)
    stats = logit_stats(z, y, temperature=torch.ones(4000))
    kept = learned_by_autodeco(stats, 0.6, torch.Generator().manual_seed(0))
    easy, valid = (stats.rank == 0), y != IGNORE
    assert kept[valid & ~easy].all()
    assert not kept[~valid].any()
    share = kept[easy].float().mean().item()
    assert abs(share - 0.4) < 5 * (0.24 / easy.sum().item()) ** 0.5


def test_temperature_gradcheck():
    h, w, y, T, _ = case()

    def loss(t):
        stats = logit_stats(h @ w.T, y, temperature=t, backend="torch")
        return autodeco_temperature_loss(
            t, stats, generator=torch.Generator().manual_seed(1), reduction="none"
        )

    assert torch.autograd.gradcheck(loss, (T,))


@pytest.mark.parametrize("steepness", [30.0, 3.0, 0.0])
def test_soft_top_p_is_the_released_one(steepness):
    h, w, y, T, P = case()
    ours = soft_top_p_loss(h, w, y, T, P, steepness=steepness, chunk_bytes=4 * 90 * 8)
    theirs = soft_top_p(h @ w.T, T, P, y, steepness)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    for mine, exact in zip(torch.autograd.grad(ours, (T, P)), torch.autograd.grad(theirs, (T, P))):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_soft_top_p_gradcheck(softcap):
    h, w, y, T, P = case()
    b = torch.randn(90, dtype=torch.float64)
    options = {"bias": b, "logit_scale": 0.5, "softcap": softcap, "reduction": "none"}
    assert torch.autograd.gradcheck(
        lambda t, p: soft_top_p_loss(h, w, y, t, p, **options), (T, P), atol=1e-6
    )


def test_soft_top_p_in_fp32():
    h, w, y, T, P = case()
    exact = soft_top_p_loss(h, w, y, T, P, reduction="none")
    gradients = torch.autograd.grad(exact.sum(), (T, P))
    T32, P32 = (x.detach().float().requires_grad_() for x in (T, P))
    rows = soft_top_p_loss(h.float(), w.float(), y, T32, P32, reduction="none")
    torch.testing.assert_close(rows.double(), exact, rtol=2e-5, atol=1e-6)
    for mine, want in zip(torch.autograd.grad(rows.sum(), (T32, P32)), gradients):
        torch.testing.assert_close(mine.double(), want, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_soft_top_p_of_banned_ids_is_that_without_them(kind):
    """A logit of −inf weighs nothing: p = 0 meets no difference of infinities."""
    h, w, y, T, P = case(kind=kind)
    y = y.clamp(max=59)
    bias = torch.zeros(90, dtype=kind)
    bias[60:] = -torch.inf
    ours = soft_top_p_loss(h, w, y, T, P, bias=bias)
    given = (x.detach().double().requires_grad_() for x in (h, w[:60], T, P))
    h, w, *exact = given
    theirs = soft_top_p_loss(h, w, y, *exact)
    bound = {torch.float64: 1e-12, torch.float32: 1e-4}[kind]
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)
    gradients = torch.autograd.grad(ours, (T, P)), torch.autograd.grad(theirs, exact)
    for mine, want in zip(*gradients):
        torch.testing.assert_close(mine.double(), want, rtol=0, atol=bound)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
def test_soft_top_p_of_a_banned_target_is_nothing(kind):
    h, w, y, T, P = case(kind=kind)
    bias = torch.zeros(90, dtype=kind)
    bias[y[1]] = -torch.inf
    with torch.no_grad():
        T[1] = 1e-9  # clamped to the lowest
    rows = soft_top_p_loss(h, w, y, T, P, bias=bias, reduction="none")
    gradients = torch.autograd.grad(rows.sum(), (T, P))
    assert [x[1].item() for x in (rows, *gradients)] == [0.0, 0.0, 0.0]
    assert all(x.isfinite().all() for x in (rows, *gradients))


def test_the_size_of_blocks_changes_nothing(monkeypatch):
    from autodeco_fast.torch_backend import soft_top_p

    h, w, y, T, P = case()
    whole = soft_top_p_loss(h, w, y, T, P, reduction="none")
    for bytes_of_block in (1, 90 * 8 * 2):
        monkeypatch.setattr(soft_top_p, "CPU_BLOCK_BYTES", bytes_of_block)
        assert torch.equal(soft_top_p_loss(h, w, y, T, P, reduction="none"), whole)
    assert soft_top_p.BLOCK_BYTES > soft_top_p.CPU_BLOCK_BYTES


def test_all_ignored_is_zero():
    h, w, y, T, P = case()
    nothing = torch.full_like(y, IGNORE)
    stats = logit_stats(h @ w.T, nothing, temperature=T)
    for loss in (autodeco_temperature_loss(T, stats), soft_top_p_loss(h, w, nothing, T, P)):
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, T)
        assert not gradient.any()


@pytest.mark.parametrize("V", [2, 4, 5, 90, 5000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0])
def test_prob_stats(V, spread, backend):
    g = torch.Generator().manual_seed(V)
    z = torch.randn(6, V, generator=g) * spread
    T = torch.tensor([0.05, 0.3, 0.7, 1.0, 1.5, 2.0])
    want = joint_features(z.double(), T.double())
    for name, got, exact in zip(
        ("max", "entropy", "variance", "top5"), prob_stats(z, T, backend=backend), want
    ):
        torch.testing.assert_close(
            got.double(),
            exact.nan_to_num(),
            rtol=3e-5,
            atol=1e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_prob_stats_of_ties_and_strides(backend):
    z = torch.zeros(4, 40)
    z[:, 7:16] = 3.0
    z[1, 20] = -float("inf")
    T = torch.ones(4)
    want = joint_features(z[::2, 4:36].double(), T[::2].double())
    for got, exact in zip(prob_stats(z[::2, 4:36], T[::2], backend=backend), want):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("enhanced", [True, False])
def test_top_p_head(enhanced):
    head = TopPHead(12, use_enhanced_features=enhanced, intermediate_size=8)
    assert {n: tuple(p.shape) for n, p in head.named_parameters()} == {
        "mlp.0.weight": (8, 17 if enhanced else 13),
        "mlp.0.bias": (8,),
        "mlp.2.weight": (1, 8),
        "mlp.2.bias": (1,),
    }
    h, w, _, T, _ = case(kind=torch.float32)
    features = prob_stats(h @ w.T, T.detach()) if enhanced else None
    columns = [h, T[:, None], *([f[:, None] for f in features] if enhanced else [])]
    torch.testing.assert_close(
        head(h, T, features), torch.sigmoid(head.mlp(torch.cat(columns, -1)))[:, 0]
    )
    with pytest.raises(ValueError, match="features must be"):
        head(h, T, None if enhanced else prob_stats(h @ w.T, T.detach()))


def test_says_what_is_wrong():
    h, w, y, T, P = case()
    plain, scaled = logit_stats(h @ w.T, y), logit_stats(h @ w.T, y, temperature=T)
    for call, words in (
        (lambda: autodeco_temperature_loss(T, plain), "stats must be taken with temperature="),
        (
            lambda: autodeco_temperature_loss(T[:3], scaled),
            r"temperature must be \[13\], got shape \(3,\)",
        ),
        (
            lambda: autodeco_temperature_loss(T, scaled, easy_drop=2),
            r"easy_drop must be in \[0, 1\], got 2",
        ),
        (
            lambda: autodeco_temperature_loss(T, scaled, weighting="x"),
            "weighting must be one of 'unscaled', 'scaled', None, got 'x'",
        ),
        (lambda: soft_top_p_loss(h, w, y, T, P[:2]), r"top_p must be \[13\], got shape \(2,\)"),
        (
            lambda: soft_top_p_loss(h, w, y, T, P, reduction="max"),
            "reduction must be one of 'mean', 'sum', 'none', got 'max'",
        ),
        (lambda: TopPHead(0), "hidden_size must be an integer in .1, 16777216., got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
