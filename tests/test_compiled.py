"""The loops that numba compiles for CPUs, and the threads they run in."""

import os
import subprocess
import sys
import textwrap

import numba
import numpy as np
import pytest
import torch

from autodeco_fast import (
    TokenStats,
    logit_stats,
    min_p_hinge_loss,
    sample,
    subtile_maxima,
    token_stats,
)
from autodeco_fast.torch_backend import jit, sample_loops, stats_loops

elementwise_exp = numba.vectorize(lambda x: stats_loops._exp(x))
NAN = {"positive": 0x7FC00000, "negative": -0x400000}


@numba.vectorize
def exponent_and_noise(r, which):
    """⌊log₂ u⌋ or the noise of a 32-bit integer."""
    u = sample_loops.uniform_of(r)
    return np.float32(sample_loops.exponent_of(u)) if which == 0 else sample_loops.gumbel_of(u)


def test_exp():
    x = np.linspace(-87, 0, 1_000_001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(elementwise_exp(x) / exact - 1).max() < 4e-7


def test_a_score_that_is_not_looked_at_cannot_win():
    """g ≤ −⌊log₂ u⌋ · 0.69315 at all ends of the binades, where it is closest; ln 2 rounded down
    would not do."""
    ends = 2 ** np.arange(32, dtype=np.uint64)
    r = np.unique(
        np.concatenate([ends - 1, ends, ends + 1, np.arange(3000), 2**32 - 1 - ends]).astype(
            np.uint64
        )
    )
    r = r[r < 2**32]
    exponent, noise = exponent_and_noise(r, 0), exponent_and_noise(r, 1)
    assert (noise <= -exponent * sample_loops._LN2).all()
    assert not (noise <= -exponent * np.float32(0.6931)).all()


@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_the_winner_of_all_scores(min_p):
    """To the bit: every noise drawn, every score compared."""
    noise = numba.vectorize(lambda r: sample_loops.gumbel_of(sample_loops.uniform_of(r)))
    z = torch.randn(6, 5003, generator=torch.Generator().manual_seed(2)) * torch.tensor(
        [[0.0], [0.1], [1.0], [3.0], [0.1], [2.0]]
    )
    T = np.float32(0.9)
    ids = np.arange(5003)
    for row, token in enumerate(
        sample(z, 0.9, min_p=min_p, seed=8, position=5, backend="torch").token.tolist()
    ):
        values = z[row].numpy()
        score = values + T * noise(sample_loops.uniform_bits(8, 5, row, ids, 0))
        kept = values >= (values.max() + T * np.log(np.float32(min_p)) if min_p else -np.inf)
        assert token == np.where(kept, score, -np.inf).argmax()


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("sign", NAN)
def test_a_nan_of_either_sign_is_seen(sign, B):
    z = torch.randn(B, 2000)
    z[B - 1, 700] = torch.tensor(NAN[sign], dtype=torch.int32).view(torch.float32)
    broken = [row == B - 1 for row in range(B)]
    stats = logit_stats(z, torch.arange(B), backend="torch")
    assert (~stats.logsumexp.isfinite()).tolist() == broken
    assert (~stats.entropy.isfinite()).tolist() == broken
    assert sample(z, 1.0, seed=0, backend="torch").status.tolist() == [int(x) for x in broken]
    maxima = subtile_maxima(z, backend="torch")
    maxima.view(torch.int32)[B - 1, 2] = NAN[sign]
    assert [sample_loops.largest(row.view(np.int32)) < np.inf for row in maxima.numpy()] == [
        not x for x in broken
    ]
    given = sample(z, 1.0, seed=0, maxima=maxima, backend="torch")
    assert given.status.tolist() == [int(x) for x in broken]


def test_maxima_of_all_signs():
    """Integers stand for floats there: zeros of both signs, negative rows, subnormal numbers,
    −inf."""
    rows = [
        [-3.0, -1.5, -2.0],
        [-0.0, 0.0, -1.0],
        [-1e-40, -2e-40, -3e-40],
        [-float("inf"), -5.0, -float("inf")],
        [2.0, 7.0, 7.0],
    ]
    z = torch.tensor(rows)
    stats = logit_stats(z, torch.zeros(5, dtype=torch.int64), backend="torch")
    assert torch.equal(stats.max_logit, z.amax(-1))
    tops = torch.tensor([sample_loops.largest(row.view(np.int32)) for row in z.numpy()])
    assert torch.equal(tops, z.amax(-1))
    assert (
        stats.max_logit[torch.arange(5)].tolist()
        == z.gather(1, stats.argmax[:, None])[:, 0].tolist()
    )
    assert stats.argmax[[0, 2, 3, 4]].tolist() == [1, 0, 1, 1]
    assert stats.rank.tolist() == [2, 0, 0, 1, 2]
    torch.testing.assert_close(stats.logsumexp, z.logsumexp(-1))


def test_zeros_of_both_signs_tie_wherever_they_are():
    """In one block of a loop, in two, and in two tiles of the product: the lowest id."""
    z = torch.full((4, 70_000), -5.0)
    for row, (low, high) in enumerate([(3, 9), (0, 600), (511, 512), (100, 69_000)]):
        z[row, low], z[row, high] = -0.0, 0.0
    lowest = [3, 0, 511, 100]
    assert logit_stats(z, torch.zeros(4).long(), backend="torch").argmax.tolist() == lowest
    assert sample(z, 0.0, seed=0, backend="torch").token.tolist() == lowest
    assert sample(z, 0.0, top_k=1, seed=0, backend="torch").token.tolist() == lowest
    in_fp64 = logit_stats(z.double(), torch.zeros(4).long(), backend="torch")
    assert in_fp64.argmax.tolist() == lowest
    ones = torch.ones(4, 1)
    of_product = token_stats(ones[:1], z[1, :, None], torch.zeros(1).long(), backend="torch")
    assert of_product.argmax.item() == 0


def test_bf16_is_read_as_it_is():
    z = (torch.randn(9, 3001) * 4).bfloat16()
    T = torch.linspace(0.2, 2.0, 9)
    y = torch.arange(9)
    brief, wide = (logit_stats(x, y, temperature=T, backend="torch") for x in (z, z.float()))
    for a, b in zip(brief, wide):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loops_write_to_the_host_whatever_the_default_device_is(dtype):
    z = torch.randn(3, 700).to(dtype)
    z[1, 5] = torch.nan
    want = sample(z, 0.7, min_p=0.1, top_k=9, seed=3, return_logprob=True, backend="torch")
    with torch.device("meta"):
        ours = sample(z, 0.7, min_p=0.1, top_k=9, seed=3, return_logprob=True, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(ours, want) if a is not None)
    assert want.status.tolist() == [0, 1, 0]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads, monkeypatch):
    z = torch.randn(7, 300_000)
    y = torch.arange(7)

    def results() -> list[torch.Tensor]:
        stats = logit_stats(z, y, backend="torch")
        many = TokenStats(*(x.repeat(50_000) for x in stats[:6]))
        T = torch.linspace(0, 2, len(many.rank))
        hinge = min_p_hinge_loss(T, many, backend="torch")
        return [*stats[:6], sample(z, 1.0, seed=3, backend="torch").token, hinge]

    alone = results()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen = []
    jit.in_threads(lambda rows: seen.extend(range(7)[rows]), 7, 100)
    assert sorted(seen) == list(range(7))
    assert all(torch.equal(a, b) for a, b in zip(alone, results(), strict=True))


def test_what_fails_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def work(rows: slice) -> None:
        if rows.start:
            raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        jit.in_threads(work, 3, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    script = """
        import os, threading
        from autodeco_fast.torch_backend import jit
        import torch

        def rows_and_threads():
            rows, threads, four = [], set(), threading.Barrier(4)

            def work(own):
                rows.extend(range(8)[own])
                threads.add(threading.get_ident())
                four.wait(60)

            jit.in_threads(work, 8, 8)
            return sorted(rows), len(threads)

        torch.get_num_threads = lambda: 4
        expected = list(range(8)), 4
        assert rows_and_threads() == expected
        child = os.fork()
        if child == 0:
            os._exit(0 if rows_and_threads() == expected else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_new_code_and_code_from_the_cache_round_alike(tmp_path):
    script = """
        import hashlib, torch
        from autodeco_fast import TokenStats, logit_stats, min_p_hinge_loss
        from autodeco_fast import soft_top_p_loss, token_stats

        g = torch.Generator().manual_seed(0)
        T = torch.rand(300, generator=g).mul_(2).requires_grad_()
        P = torch.rand(300, generator=g).requires_grad_()
        y = torch.arange(300)
        h, w = torch.randn(300, 32, generator=g), torch.randn(8192, 32, generator=g)
        for kind in (torch.float32, torch.bfloat16):
            stats = token_stats(h.to(kind), w.to(kind), y, temperature=T, backend="torch")
            direct = logit_stats(h.to(kind) @ w.to(kind).T, y, backend="torch")
            hinge = min_p_hinge_loss(T, stats, power=2, backend="torch")
            soft = soft_top_p_loss(h.to(kind), w.to(kind), y, T, P)
            rest = [hinge, soft, *torch.autograd.grad(hinge + soft, (T, P))]
            for x in [*stats, *direct, *rest]:
                if x is not None:
                    print(hashlib.sha256(x.detach().numpy().tobytes()).hexdigest())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}

    def run() -> str:
        return subprocess.run(
            command, env=env, check=True, capture_output=True, text=True, timeout=300
        ).stdout

    new = run()
    assert list(tmp_path.rglob("*.nbc"))
    assert len(new.split()) > 30
    assert run() == new


def test_compiles_where_nothing_can_be_written():
    def decorator(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")
        return lambda f: (f, options)

    assert jit._cached(decorator, nogil=True)(max) == (max, {"nogil": True})
