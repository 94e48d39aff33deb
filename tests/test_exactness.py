"""Every op that computes floats against fp64: its error is at most twice that of torch in the same
dtype, written plainly (`tests/reference/plain.py`), plus one epsilon of the largest number
returned, or of the softcap that it is made of."""

from collections.abc import Callable

import pytest
import torch

import autodeco_fast as af
from tests import op_cases
from tests.on_device import on_device
from tests.reference import plain
from tests.reference.plain import assert_no_worse

SOFTCAP = 20.0  # of the cases below that have one


def floats(results) -> list[torch.Tensor]:
    return [x for x in op_cases.flat(results) if x.is_floating_point()]


def case(name: str) -> Callable:
    run = on_device(op_cases.CASES[name][1])
    return lambda t, backend: floats(run(t, backend=backend))


def moments(t: dict, backend: str) -> list[torch.Tensor]:
    T = t["temperature"].detach().requires_grad_()
    stats = af.logit_stats(t["logits"], t["target"], temperature=T, backend=backend)
    rows = stats.scaled_logsumexp, stats.scaled_entropy, stats.scaled_log_prob
    return [torch.autograd.grad(x.sum(), T, retain_graph=True)[0] for x in rows]


def merged(t: dict, backend: str) -> list[torch.Tensor]:
    partial = op_cases.CASES["token_stats_partial"][1](t, backend=backend)
    return floats(af.merge_token_stats([partial], t["target"], temperature=t["temperature"]))


def linear_width(t: dict, backend: str) -> list[torch.Tensor]:
    """By row: in a mean torch's errors may cancel."""
    T = t["temperature"].detach().requires_grad_()
    given = {"bias": t["bias"], "softcap": SOFTCAP, "row_weight": t["loss_weight"]}
    given |= {"chunk_bytes": 1000, "reduction": "none", "backend": backend}
    rows = af.linear_nucleus_width_loss(T, t["hidden"], t["weight"], **given)
    return [rows.detach(), *torch.autograd.grad(rows, T, t["grad"])]


def soft_top_p(t: dict, backend: str) -> list[torch.Tensor]:
    T, P = (t[name].detach().requires_grad_() for name in ("temperature", "top_p"))
    given = t["hidden"], t["weight"], t["target"], T, P
    rows = af.soft_top_p_loss(*given, bias=t["bias"], reduction="none")
    return [rows.detach(), *torch.autograd.grad(rows.sum(), (T, P))]


def of_logits(t: dict) -> torch.Tensor:
    return plain.capped(plain.wide(t["logits"]), SOFTCAP)


def stats_of_product(t: dict, **options) -> list[torch.Tensor]:
    return plain.stats(plain.product(t), t, **options)


def target_logits(t: dict) -> list[torch.Tensor]:
    z = plain.at_target(plain.product(t), t)
    return [z.masked_fill(t["target"] == plain.IGNORE, -torch.inf)]


# name → the op, what torch does, and the largest number on the way
OPS: dict[str, tuple[Callable, Callable, float]] = {
    "logit_stats": (case("logit_stats"), lambda t: plain.stats(of_logits(t), t), SOFTCAP),
    "logit_stats, cut": (
        case("logit_stats, cut"),
        lambda t: plain.stats(of_logits(t), t, cut=True),
        SOFTCAP,
    ),
    "logit_stats, slopes": (moments, plain.moments, 1.0),
    **{
        f"token_stats, fused={fused}": (
            case(f"token_stats, fused={fused}"),
            stats_of_product,
            1.0,
        )
        for fused in (True, False)
    },
    "token_stats, cut": (
        case("token_stats, cut"),
        lambda t: stats_of_product(t, cut=True),
        1.0,
    ),
    "token_stats, merged": (merged, stats_of_product, 1.0),
    "target_logits": (case("target_logits"), target_logits, 1.0),
    "prob_stats": (case("prob_stats"), plain.prob_stats, 1.0),
    "temperature_head": (case("temperature_head"), plain.head, 1.0),
    "min_p_hinge_loss": (case("min_p_hinge_loss"), lambda t: plain.hinge(t, "mean"), 1.0),
    "min_p_hinge_loss, rows": (
        case("min_p_hinge_loss, rows"),
        lambda t: plain.hinge(t, "none"),
        1.0,
    ),
    "nucleus_width_loss": (
        case("nucleus_width_loss"),
        lambda t: plain.width(of_logits(t), t),
        1.0,
    ),
    "linear_nucleus_width_loss": (
        linear_width,
        lambda t: plain.width(plain.capped(plain.product(t), SOFTCAP), t),
        1.0,
    ),
    "soft_top_p_loss": (soft_top_p, plain.soft_top_p, 1.0),
}


def doubled(t: dict) -> dict:
    return {name: x.double() if x.is_floating_point() else x for name, x in t.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_no_op_is_much_worse_than_torch(name, dtype, backend):
    op, written, size = OPS[name]
    t = op_cases.tensors(6, dtype)
    found, theirs, exact = op(t, backend), written(t), written(doubled(t))
    assert len(found) == len(theirs) == len(exact)
    for three in zip(found, theirs, exact):
        assert_no_worse(*three, size=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_log_probabilities_are_no_worse(dtype, backend):
    """Of the token that was drawn; in cold rows z/T is large, but no difference of logits need
    be."""
    t = op_cases.tensors(64, dtype)
    t["temperature"][::2] /= 30
    names = "temperature", "min_p", "seed"
    given = {name: t[name] for name in names} | {"backend": backend}
    asked = {"return_logprob": True, "return_full_logprob": True}
    drawn = on_device(af.sample)(t["logits"], **given, **asked)
    for found, cut in ((drawn.logprob, True), (drawn.full_logprob, False)):
        theirs, exact = (
            plain.log_prob(plain.wide(x["logits"]), x, drawn.token, cut=cut)
            for x in (t, doubled(t))
        )
        assert_no_worse(found, theirs, exact)
    asked = {"bias": t["bias"], "fused": True, "return_full_logprob": True}
    drawn = on_device(af.linear_sample)(t["hidden"], t["weight"], **given, **asked)
    theirs, exact = (
        plain.log_prob(plain.product(x), x, drawn.token, cut=False) for x in (t, doubled(t))
    )
    assert_no_worse(drawn.full_logprob, theirs, exact)


def test_a_worse_op_would_be_seen():
    """The control: sums in bf16 of what torch sums in fp32."""
    t = op_cases.tensors(6)
    exact = plain.product(doubled(t)).logsumexp(-1)
    theirs = plain.product(t).logsumexp(-1)
    assert_no_worse(theirs, theirs, exact)
    with pytest.raises(AssertionError):
        assert_no_worse(theirs.bfloat16().float(), theirs, exact)
    with pytest.raises(AssertionError):
        assert_no_worse(theirs + float("nan"), theirs, exact)


def test_log_probabilities_over_chunks_are_no_worse(monkeypatch):
    """The maximum of all logits so far changes from chunk to chunk; one of them holds no token.
    Logits are whole numbers, which every product gets right."""
    monkeypatch.setattr("autodeco_fast.torch_backend.linear_sample.COLUMNS", 8)
    monkeypatch.setattr("autodeco_fast.torch_backend.linear_sample.CHUNK", 0)
    t = op_cases.tensors(64)
    t |= {name: t[name].round() for name in ("hidden", "weight")}
    t["temperature"][::2] /= 30
    t["bias"] = torch.linspace(0, 9, len(t["bias"])).round()
    t["bias"][:8] = -torch.inf
    given = {name: t[name] for name in ("temperature", "bias", "seed")}
    asked = {"return_full_logprob": True, "fused": True, "backend": "torch"}
    drawn = af.linear_sample(t["hidden"], t["weight"], **given, **asked)
    theirs, exact = (
        plain.log_prob(plain.product(x), x, drawn.token, cut=False) for x in (t, doubled(t))
    )
    assert_no_worse(drawn.full_logprob, theirs, exact)
