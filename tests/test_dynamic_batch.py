"""One graph for every batch size: no op asks a tracer how many rows there are."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from autodeco_fast import linear_sample, logit_stats, prob_stats, sample, token_stats

W = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


class Sample(torch.nn.Module):
    def forward(self, h, T):
        out = sample(h @ W.T, T, min_p=0.1, seed=1, return_full_logprob=True, backend="torch")
        return out.token, out.full_logprob


class LinearSample(torch.nn.Module):
    def forward(self, h, T):
        given = {"min_p": 0.1, "seed": 1, "backend": "torch"}
        fused = linear_sample(h, W, T, fused=True, return_full_logprob=True, **given)
        return fused.token, fused.full_logprob, linear_sample(h, W, T, **given).token


class LogitStats(torch.nn.Module):
    def forward(self, h, T):
        y = torch.zeros(h.shape[0], dtype=torch.int64)
        at = {"temperature": T, "min_p": 0.1, "cut": True, "backend": "torch"}
        of_hidden = token_stats(h, W, y, **at).scaled_entropy
        return *logit_stats(h @ W.T, y, **at)[5:], of_hidden, *prob_stats(h @ W.T, T)


MODULES = pytest.mark.parametrize("module", [Sample(), LinearSample(), LogitStats()], ids=repr)


def rows(n):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 8, generator=g), torch.rand(n, generator=g) + 0.3


def assert_same(module, run, n):
    for got, want in zip(run(*rows(n)), module(*rows(n))):
        torch.testing.assert_close(got, want)


@MODULES
def test_one_graph_serves_every_batch_size(module):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, dynamic=True, fullgraph=True)
    for n in (2, 3, 5):
        assert_same(module, compiled, n)
    assert counter.frame_count == 1


@MODULES
def test_export_with_a_dynamic_batch(module):
    B = torch.export.Dim("B", min=2, max=64)
    exported = torch.export.export(module, rows(4), dynamic_shapes=({0: B}, {0: B}))
    for n in (2, 7):
        assert_same(module, exported.module(), n)
