"""Every public op under transforms of torch, which are refused in one line, and exported."""

import pytest
import torch

import autodeco_fast
from autodeco_fast import TemperatureHead, linear_sample, merge_samples, sample, sample_partial
from autodeco_fast.backends import resolve
from tests.on_device import DEVICE
from tests.refusals import one_line


def public_ops() -> dict:
    """One differentiable-looking call of every public op, from a `[4, 8]` tensor."""
    w, y, ones = torch.randn(20, 8), torch.arange(4), torch.ones(4)
    stats = autodeco_fast.logit_stats(torch.randn(4, 20), y, temperature=ones)
    head = TemperatureHead(8).requires_grad_(False)
    part = autodeco_fast.sample_partial(torch.randn(4, 8), 1.0, first_id=0, seed=0)
    stats_part = autodeco_fast.token_stats_partial(
        torch.randn(4, 8), w, y, ones, first_id=0, temperature=ones
    )
    return {
        "sample": lambda x: sample(x, 1.0, seed=0, return_logprob=True).logprob,
        "temperature of sample": lambda x: (
            sample(torch.ones(4, 8), x[:, 0], seed=0, return_logprob=True).logprob
        ),
        "linear_sample": lambda x: linear_sample(x, w, 1.0, seed=0, return_logprob=True).logprob,
        "sample_partial": lambda x: sample_partial(x, 1.0, first_id=0, seed=0).score,
        "merge_samples": lambda x: merge_samples([part], x[:, 0])[0],
        "logit_stats": lambda x: autodeco_fast.logit_stats(x, y).logsumexp,
        "token_stats": lambda x: autodeco_fast.token_stats(x, w, y).logsumexp,
        "target_logits": lambda x: autodeco_fast.target_logits(x, w, y, first_id=0),
        "token_stats_partial": lambda x: autodeco_fast.token_stats_partial(
            x, w, y, ones, first_id=0
        ).floats[0],
        "merge_token_stats": lambda x: (
            autodeco_fast.merge_token_stats([stats_part], y, temperature=x[:, 0]).logsumexp
        ),
        "prob_stats": lambda x: autodeco_fast.prob_stats(x, ones).entropy,
        "TemperatureHead": head,
        "min_p_hinge_loss": lambda x: autodeco_fast.min_p_hinge_loss(
            x[:, 0], stats, unreachable="clip", reduction="none"
        ),
        "autodeco_temperature_loss": lambda x: autodeco_fast.autodeco_temperature_loss(
            x[:, 0], stats, reduction="none"
        ),
        "soft_top_p_loss": lambda x: autodeco_fast.soft_top_p_loss(
            torch.ones(4, 8), w, y, x[:, 0], x[:, 1], reduction="none"
        ),
    }


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", public_ops())
def test_transforms_are_refused(name):
    """Where they would give a wrong derivative, batch or constant without a word, or fail in
    many."""
    op, x = public_ops()[name], torch.rand(4, 8)

    def run(x):
        return op(x).float().sum()

    words = "autodeco_fast cannot run under torch.vmap"
    one_line(lambda: torch.vmap(run)(x[None].expand(3, -1, -1)), words, error=RuntimeError)
    one_line(lambda: torch.func.grad(run)(x), words, error=RuntimeError)
    one_line(lambda: torch.func.jvp(run, (x,), (x,)), words, error=RuntimeError)
    one_line(
        lambda: torch.jit.trace(run, x),
        "autodeco_fast cannot be traced by torch.jit.trace",
        error=RuntimeError,
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        one_line(lambda: run(dual), words, error=RuntimeError)
    run(x)


def test_exports():
    class Draw(torch.nn.Module):
        def forward(self, z, T):
            return sample(z, T, min_p=0.1, seed=4, backend="torch").token

    z, T = torch.randn(3, 300) * 3, torch.full((3,), 0.8)
    program = torch.export.export(Draw(), (z, T))
    assert torch.equal(program.module()(z, T), Draw()(z, T))
    assert resolve(None, z) == ("triton" if DEVICE == "cuda" else "torch")
