"""A head's training step: equal to AutoDeco's released step and to plain autograd, whatever the
batches."""

import math

import pytest
import torch
from torch import nn

from autodeco_fast import TemperatureHead, TopPHead
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.objectives import (
    AutoDecoJoint,
    AutoDecoTemperature,
    AutoDecoTopP,
    Batch,
    LabelFree,
    MinPHinge,
)
from autodeco_fast.training.step import training_step
from tests.allocations import LargestAllocation
from tests.reference import autodeco

IGNORE = -100
BOTH_HEADS = (AutoDecoJoint, AutoDecoTopP)


def case(N=40, H=16, V=120, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g)
    lm_head = nn.Linear(H, V, bias=False).requires_grad_(False)
    lm_head.weight.copy_(torch.randn(V, H, generator=g))
    y = torch.randint(0, V, (N,), generator=g)
    y[::3] = lm_head(hidden).argmax(-1)[::3]
    y[::5] = IGNORE
    torch.manual_seed(seed)
    heads = nn.ModuleDict(
        {"temp_head": TemperatureHead(H, 8), "top_p_head": TopPHead(H, intermediate_size=8)}
    )
    for p in heads.parameters():
        nn.init.normal_(p, std=0.3)
    return hidden, y, lm_head, heads


def gradients(head: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in head.parameters()]


@pytest.mark.parametrize("joint", [False, True])
def test_is_the_released_step(joint):
    hidden, y, lm_head, heads = case()
    head = heads if joint else heads["temp_head"]
    uniform = torch.rand(len(y))
    objective = AutoDecoJoint(chunk_bytes=7 * 120 * 4) if joint else AutoDecoTemperature()
    step, seen = training_step(hidden, y, lm_head, head, objective, uniform)
    step.assign(head.parameters())
    ours = gradients(head)
    head.zero_grad()
    z = hidden @ lm_head.weight.T
    selected = (y >= 0) & ~((z.argmax(-1) == y) & (uniform < 0.6))
    assert torch.equal(seen.selected, selected)
    T = 2 * torch.sigmoid(heads["temp_head"].mlp(hidden))[:, 0]
    loss = autodeco.temperature_loss(z, T, y, selected, "unscaled")
    if joint:
        P = autodeco.joint_top_p(heads["top_p_head"].mlp, hidden, z, T)
        loss = loss + autodeco.soft_top_p(z, T, P, y)
    loss.backward()
    assert sum(step.means().values()) == pytest.approx(loss.item(), rel=1e-5)
    for mine, theirs in zip(ours, gradients(head)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [
        MinPHinge(easy_fraction=0.5),
        LabelFree(),
        AutoDecoTemperature(),
        AutoDecoTemperature(goldilocks_filter=True, easy_fraction=0.5),
        AutoDecoTopP(),
        AutoDecoJoint(),
    ],
)
def test_batches_change_nothing(objective):
    """Means are over the tokens of the whole step, not means of the batches' means."""
    hidden, y, lm_head, heads = case()
    head = heads if isinstance(objective, BOTH_HEADS) else heads["temp_head"]
    uniform = torch.rand(len(y))
    whole, _ = training_step(hidden, y, lm_head, head, objective, uniform)
    cuts = (slice(0, 3), slice(3, 25), slice(25, 40))
    steps = [training_step(hidden[c], y[c], lm_head, head, objective, uniform[c])[0] for c in cuts]
    total = steps[0] + steps[1] + steps[2]
    assert total.means() == pytest.approx(whole.means(), rel=1e-5)
    grads = []
    for step in (whole, total):
        step.assign(head.parameters())
        grads.append(gradients(head))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "objective",
    [MinPHinge(), LabelFree(), AutoDecoTemperature(), AutoDecoTopP(), AutoDecoJoint()],
)
def test_nothing_to_learn_from_is_zero(objective):
    hidden, y, lm_head, heads = case()
    head = heads if isinstance(objective, BOTH_HEADS) else heads["temp_head"]
    step, _ = training_step(hidden, torch.full_like(y, IGNORE), lm_head, head, objective)
    step.assign(head.parameters())
    assert all(value == 0 for value in step.means().values())
    assert not any(g.any() for g in gradients(head))


def test_hidden_states_get_no_gradient():
    hidden, y, lm_head, heads = case()
    training_step(hidden.requires_grad_(), y, lm_head, heads["temp_head"], MinPHinge())
    assert hidden.grad is None


def test_scale_and_softcap_of_the_base_are_used():
    hidden, y, lm_head, heads = case()
    base = BaseModel(None, lm_head.weight, None, 0.5, 3.0)
    step, seen = training_step(
        hidden, y, base, heads["temp_head"], MinPHinge(max_rank=120, easy_fraction=1.0)
    )
    z = 3.0 * torch.tanh(0.5 * hidden @ lm_head.weight.T / 3.0)
    gap = z.amax(-1) - z.gather(1, y.clamp(min=0)[:, None])[:, 0]
    required = gap / -math.log(0.1)
    reached = (y >= 0) & (required <= 2)
    T = seen.temperature
    assert step.means()["hinge"] == pytest.approx(
        ((required - T).relu() + 0.1 * T)[reached].mean().item(), rel=1e-5
    )


def test_never_holds_all_logits():
    hidden, y, lm_head, heads = case(N=256, V=3000)
    chunk_bytes = 32 * 3000 * 4
    for objective in (
        MinPHinge(),
        LabelFree(chunk_bytes=chunk_bytes),
        AutoDecoTemperature(),
        AutoDecoJoint(chunk_bytes=chunk_bytes),
    ):
        head = heads if isinstance(objective, BOTH_HEADS) else heads["temp_head"]
        with LargestAllocation() as seen:
            training_step(hidden, y, lm_head, head, objective)
        limit = 32 * 3000 if hasattr(objective, "chunk_bytes") else 256 * 3000
        assert seen.numel <= limit


@pytest.mark.parametrize(
    "objective",
    [
        MinPHinge(),
        LabelFree(chunk_bytes=20 * 120 * 4),
        AutoDecoTemperature(),
        AutoDecoJoint(chunk_bytes=20 * 120 * 4),
    ],
)
def test_compiles_without_a_break(objective):
    hidden, y, lm_head, heads = case()
    head = heads if isinstance(objective, BOTH_HEADS) else heads["temp_head"]
    uniform = torch.rand(40)

    def loss(hidden, target, uniform):
        sums = objective(Batch(hidden, target, uniform), lm_head, head)
        return sum(loss for loss, _ in sums.terms.values())

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, y, uniform), loss(hidden, y, uniform))
    ours, eager = (
        torch.autograd.grad(f(hidden, y, uniform), head.parameters()) for f in (compiled, loss)
    )
    for a, b in zip(ours, eager):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("unreachable", ["drop", "clip"])
def test_the_loss_of_broken_hidden_states_is_not_a_number(unreachable):
    """So that a run stops, instead of learning from what is left."""
    hidden, y, lm_head, heads = case()
    hidden[1] = math.nan
    step, _ = training_step(
        hidden, y, lm_head, heads["temp_head"], MinPHinge(unreachable=unreachable), torch.zeros(40)
    )
    assert step.terms["hinge"].loss.isnan()
