"""Statistics of an LM head's product: both designs, both backends, split vocabularies, weights that
are refused."""

import itertools
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import autodeco_fast
from autodeco_fast import TokenStats
from tests.allocations import LargestAllocation
from tests.forked import on_two_processes
from tests.on_device import merge_token_stats, target_logits, token_stats, token_stats_partial
from tests.reference.stats import IGNORE, assert_matches, reference


@pytest.fixture(params=[True, False], ids=["streaming", "chunked"])
def fused(request) -> bool:
    return request.param


def case(N, H, V, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed + N)
    h, w = torch.randn(N, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    y = torch.randint(0, V, (N,), generator=g)
    y[::4] = IGNORE
    return h, w, torch.randn(V, generator=g).to(dtype), y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("N, H, V", [(5, 24, 301), (130, 16, 130), (3, 7, 3000), (1, 8, 1)])
def test_matches_fp64(N, H, V, softcap, bias, fused, backend):
    h, w, b, y = case(N, H, V)
    b = b if bias else None
    T = torch.linspace(0.1, 2.0, N)
    x = h.double() @ w.double().T + (0 if b is None else b.double())
    options = {"bias": b, "logit_scale": 0.5, "softcap": softcap, "temperature": T, "min_p": 0.2}
    stats = token_stats(h, w, y, **options, fused=fused, chunk_bytes=40 * V, backend=backend)
    want = reference(x, y, 0.5, softcap, T.double(), 0.2)
    assert stats.kept.tolist() == want[9].tolist()
    assert (stats.max_logit >= stats.target_logit).all()
    if softcap is None:  # softcapped maxima tie in fp32: neither argmax nor rank is decided
        assert_matches(TokenStats(*stats[:6]), want[:6], 20)
    for field in (0, 2, 3, 5):
        torch.testing.assert_close(stats[field].double(), want[field], rtol=0, atol=5e-5)
    for field in (7, 8):
        error = (stats[field].double() - want[field]).abs() * T
        assert error.max() < 5e-5, field


@settings(max_examples=20)
@given(
    st.integers(1, 140),
    st.integers(1, 40),
    st.integers(1, 400),
    st.sampled_from(["torch", "triton"]),
    st.booleans(),
)
def test_any_shape(N, H, V, backend, fused):
    h, w, _, y = case(N, H, V)
    stats = token_stats(h, w, y, fused=fused, backend=backend)
    assert_matches(stats, reference(h.double() @ w.double().T, y), 20)


def test_bf16_is_as_exact_as_torch(fused, backend):
    h, w, _, y = case(8, 64, 500, torch.bfloat16)
    stats = token_stats(h, w, y, fused=fused, backend=backend)
    rows = y != IGNORE
    expected = reference(h.double() @ w.double().T, y)
    ours = (stats.logsumexp.double() - expected[3]).abs().max()
    theirs = ((h @ w.T).float().logsumexp(-1).double() - expected[3])[rows].abs().max()
    assert ours <= 2 * theirs + 1e-6


def test_splits_only_change_rounding():
    from autodeco_fast.kernels.token_stats import token_stats as direct
    from tests.on_device import DEVICE

    h, w, _, y = (t.to(DEVICE) for t in case(9, 16, 2000))
    column = y.clamp(min=0)
    results = [
        direct(h, w, column, None, torch.full((9,), 2.0, device=DEVICE), None, 1.0, None, splits=s)
        for s in (1, 3, 7)
    ]
    for floats, ints in results[1:]:
        assert torch.equal(ints, results[0][1])
        torch.testing.assert_close(floats, results[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "N, H, V, dtype",
    [(5, 64, 300, torch.bfloat16), (260, 72, 130, torch.float16), (40, 200, 700, torch.bfloat16)],
)
@pytest.mark.parametrize("name, capability", [("HOPPER", 9), ("BLACKWELL", 10)])
def test_variants_of_the_kernel(name, capability, N, H, V, dtype, scaled):
    """Tensor descriptors, other tiles and flattened loops say what pointers say; so do operands no
    descriptor fits."""
    from autodeco_fast.kernels import token_stats as kernel
    from tests.on_device import DEVICE

    if DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < capability:
        pytest.skip(f"needs a GPU of capability {capability}")
    variant = getattr(kernel, name)
    if variant.specialize and not kernel.COMPILES_SPECIALIZED:
        pytest.skip("needs Triton 3.7")
    h, w, b, y = (t.to(DEVICE) for t in case(N, H, V, dtype))
    column = y.clamp(min=-1)
    inverse = torch.linspace(0.5, 4.0, N, device=DEVICE) if scaled else None
    rest = (column, torch.full((N,), 2.0, device=DEVICE), inverse, b, 0.5, 20.0)
    assert kernel._describable(h)
    assert kernel._describable(w)
    floats, ints = kernel.token_stats(h, w, *rest, variant=variant)
    expected, expected_ints = kernel.token_stats(h, w, *rest, variant=kernel.POINTERS)
    assert torch.equal(ints, expected_ints)
    torch.testing.assert_close(floats, expected, rtol=2e-5, atol=2e-5)
    h, column = h[:5], column[:5]
    rest = (column, rest[1][:5], None if inverse is None else inverse[:5], *rest[3:])
    odd, odd_ints = kernel.token_stats(h[:, 3:], w[:, 3:], *rest, variant=variant)
    assert not kernel._describable(h[:, 3:])
    plain, plain_ints = kernel.token_stats(h[:, 3:], w[:, 3:], *rest)
    assert torch.equal(odd, plain)
    assert torch.equal(odd_ints, plain_ints)


def test_a_variant_that_this_triton_cannot_compile_is_refused(monkeypatch):
    from autodeco_fast.kernels import token_stats as kernel

    h, w, b, y = case(3, 16, 40, torch.bfloat16)
    monkeypatch.setattr(kernel, "COMPILES_SPECIALIZED", False)
    with pytest.raises(ValueError, match=r"variant BLACKWELL needs Triton 3.7 or newer, got \d"):
        kernel.token_stats(h, w, y, None, None, b, 1.0, None, variant=kernel.BLACKWELL)


@pytest.mark.parametrize("fused", [True, False, None])
def test_never_holds_all_logits(fused):
    h, w, y = (
        torch.randn(600, 8),
        torch.randn(20000, 8),
        torch.zeros(600, dtype=torch.long),
    )  # 12 million logits
    with LargestAllocation() as seen:
        autodeco_fast.token_stats(
            h, w, y, temperature=torch.ones(600), fused=fused, chunk_bytes=4 << 20
        )
    from autodeco_fast.torch_backend.running_sums import TILE

    assert seen.numel <= (TILE if fused is not False else 1 << 20)


def test_compiles_without_a_break(fused):
    h, w, _, y = case(5, 8, 50)

    def step(h, w, y, T):
        stats = token_stats(h, w, y, temperature=T, fused=fused, backend="torch")
        return stats.scaled_logsumexp.sum(), stats.max_logit

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    T = torch.linspace(0.5, 1.5, 5).requires_grad_()
    for ours, eager in zip(compiled(h, w, y, T), step(h, w, y, T)):
        torch.testing.assert_close(ours, eager)
    (gradient,) = torch.autograd.grad(compiled(h, w, y, T)[0], T)
    assert torch.equal(gradient, torch.autograd.grad(step(h, w, y, T)[0], T)[0])


def shards(V: int, R: int) -> list[slice]:
    edges = [V * r // R for r in range(R + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("R", [1, 2, 4])
def test_a_split_vocabulary_merges_exactly(R, fused, backend):
    N, H, V = 12, 16, 203
    h, w, b, y = case(N, H, V)
    T = torch.linspace(0.3, 2.0, N).requires_grad_()
    common = {"logit_scale": 0.7, "softcap": 20.0, "backend": backend}
    cut = [(w[s], b[s], s.start) for s in shards(V, R)]
    logit = torch.stack(
        [target_logits(h, part, y, bias=bias, first_id=at, **common) for part, bias, at in cut]
    ).amax(0)
    one = {"temperature": T.detach(), "fused": fused, "chunk_bytes": 900, **common}
    parts = [
        token_stats_partial(h, part, y, logit, bias=bias, first_id=at, **one)
        for part, bias, at in cut
    ]
    merged = merge_token_stats(parts[::-1], y, temperature=T)
    whole = token_stats(h, w, y, bias=b, **{**one, "temperature": T})
    assert merged.argmax.tolist() == whole.argmax.tolist()
    assert merged.rank.tolist() == whole.rank.tolist()
    for ours, theirs in zip(merged[:9], whole[:9]):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)
    gradients = [
        torch.autograd.grad(s.scaled_logsumexp.sum() + s.scaled_entropy.sum(), T)[0]
        for s in (merged, whole)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_a_real_group_of_two_processes():
    code = textwrap.dedent("""
        import torch, torch.distributed as dist
        from autodeco_fast import TokenStatsPartial, merge_token_stats, target_logits
        from autodeco_fast import token_stats, token_stats_partial

        dist.init_process_group("gloo")
        g = torch.Generator().manual_seed(0)
        h, w = torch.randn(9, 16, generator=g), torch.randn(200, 16, generator=g)
        y = torch.randint(0, 200, (9,), generator=g)
        first = 100 * dist.get_rank()
        mine = w[first : first + 100]
        logit = target_logits(h, mine, y, first_id=first)
        dist.all_reduce(logit, dist.ReduceOp.MAX)
        part = token_stats_partial(h, mine, y, logit, first_id=first)
        gathered = [[torch.empty_like(x) for _ in range(2)] for x in part]
        for x, into in zip(part, gathered):
            dist.all_gather(into, x)
        merged = merge_token_stats([TokenStatsPartial(*p) for p in zip(*gathered)], y)
        whole = token_stats(h, w, y)
        for ours, theirs in zip(merged[:6], whole[:6]):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6)
        dist.barrier()
        dist.destroy_process_group()
    """)
    done = on_two_processes(code)
    assert done.returncode == 0, done.stderr


def test_chunks_are_whole_tiles_of_the_product():
    """Where they hold one at all; never more than was allowed."""
    from autodeco_fast.lm_head import rows_of_chunk
    from autodeco_fast.ops.token_stats import CHUNK_BYTES

    def rows(V: int, chunk_bytes: int = CHUNK_BYTES, most: int = 8192) -> int:
        return rows_of_chunk(chunk_bytes, torch.empty(V, 1, dtype=torch.bfloat16), most)

    assert [rows(V) for V in (128_256, 151_936, 262_208)] == [512, 384, 256]
    assert [rows(1000, 2000 * n + 1) for n in (0, 100, 128, 300)] == [1, 100, 128, 256]
    assert (rows(1000, most=7), rows(1000, most=0)) == (7, 1)


def test_says_what_is_wrong():
    h, w, _, y = case(3, 4, 5)

    def stats(*a, **k):
        return autodeco_fast.token_stats(*a, **k)

    for call, words in (
        (
            lambda: stats(h, w.bfloat16(), y),
            "weight must have the dtype of hidden, got torch.bfloat16 and torch.float32",
        ),
        (
            lambda: stats(h, torch.zeros(5, 4, dtype=torch.int8), y),
            "weight must be a floating-point tensor, got torch.int8",
        ),
        (
            lambda: stats(h, torch.zeros(0), y),
            r"hidden and weight must be \[N, H\] and \[V, H\]",
        ),  # a ZeRO-3 placeholder
        (
            lambda: stats(h, w, y, temperature=torch.ones(2)),
            r"temperature must be \[3\], got shape \(2,\)",
        ),
        (lambda: stats(h, w, y, min_p=0.1), "min_p needs a temperature"),
        (lambda: stats(h, w, y, chunk_bytes=0), r"chunk_bytes must be in \[1, 2\*\*63\), got 0"),
        (
            lambda: stats(h, w, torch.tensor([0, 5, 1])),
            r"target ids must be in \[0, 5\) or -100, got 5",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_sharded_weight_is_refused_by_name():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    h, w, _, y = case(3, 4, 6)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(w, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(
            ValueError,
            match=r"weight must be a plain tensor, got a DTensor: pass weight.full_tensor\(\)",
        ):
            autodeco_fast.token_stats(h, sharded, y)
    finally:
        dist.barrier()
        dist.destroy_process_group()


def test_streaming_is_chosen_where_it_was_faster(monkeypatch):
    from autodeco_fast.ops import token_stats as op

    def pays(N, H, dtype=torch.bfloat16, scaled=False) -> bool:
        hidden = torch.empty(N, H, dtype=dtype, device="meta")
        return op.streaming_pays("triton", hidden, scaled=scaled)

    assert not pays(2048, 4096)  # no Hopper
    monkeypatch.setattr(op, "is_hopper", lambda index: True)
    assert pays(2048, 4096)
    assert pays(8192, 896)
    assert not pays(8192, 4096)
    assert not pays(2048, 4096, scaled=True)
    assert not pays(2048, 4096, dtype=torch.float32)
    assert op.streaming_pays("torch", torch.empty(1, 1), scaled=True)


def test_both_sweeps_round_alike(monkeypatch):
    """Where streaming is chosen without a temperature alone, as on an H100: the cut of a maximum
    must not be applied to logits of the other design."""
    from autodeco_fast.ops import token_stats as op

    monkeypatch.setattr(op, "streaming_pays", lambda *_, scaled: not scaled)
    h, w, _, y = case(16, 64, 300, torch.bfloat16)
    at = {"temperature": torch.full((16,), 0.02), "min_p": 0.1, "backend": "triton"}
    for cut in (False, True):
        chosen = token_stats(h, w, y, **at, cut=cut)
        for ours, chunked in zip(chosen, token_stats(h, w, y, **at, cut=cut, fused=False)):
            assert torch.equal(ours, chunked)


def test_the_maximum_is_kept_whatever_the_second_product_says(monkeypatch):
    """As where its tiles are others: every logit of the second sweep is lower than the cut."""
    from autodeco_fast.ops import token_stats as op

    sums = op.row_sums_of_product

    def lower(h, w, column, threshold, *rest, logit_scale, **options):
        scale = logit_scale if threshold is None else logit_scale * (1 - 2**-20)
        return sums(h, w, column, threshold, *rest, logit_scale=scale, **options)

    monkeypatch.setattr(op, "row_sums_of_product", lower)
    h, w, _, y = case(5, 24, 100)
    at = {"temperature": torch.full((5,), 0.01), "min_p": 1.0, "backend": "triton", "fused": True}
    live = (y != IGNORE).long()
    assert token_stats(h, w, y, **at).kept.tolist() == live.tolist()
    stats = token_stats(h, w, y, **at, cut=True)
    assert stats.kept.tolist() == live.tolist()
    log_prob = stats.max_logit / stats.temperature - stats.scaled_logsumexp
    torch.testing.assert_close(log_prob, torch.zeros(5), rtol=0, atol=1e-4)
    assert (stats.scaled_entropy == 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_ranks_of_a_split_vocabulary_where_logits_tie_after_rounding(bias, fused, backend):
    """Integers: every product is exact in fp32, and many are one number in bf16."""
    g = torch.Generator().manual_seed(0)
    h, w, b, y = (
        torch.randint(low, high, shape, generator=g)
        for low, high, shape in (
            (-9, 9, (6, 64)),
            (-9, 9, (400, 64)),
            (-9, 9, (400,)),
            (0, 400, (6,)),
        )
    )
    h, w, b = h.bfloat16(), w.bfloat16(), b.bfloat16() if bias else None
    y = (h.float() @ w.float().T).topk(20).indices[:, -1]  # where a step of bf16 is 2 or 4
    how = {"logit_scale": 0.3, "fused": fused, "backend": backend}
    cut = [(w[s], None if b is None else b[s], s.start) for s in shards(400, 2)]
    logit = torch.stack(
        [target_logits(h, part, y, bias=bias, first_id=at, **how) for part, bias, at in cut]
    ).amax(0)
    parts = [
        token_stats_partial(h, part, y, logit, bias=bias, first_id=at, **how)
        for part, bias, at in cut
    ]
    whole = token_stats(h, w, y, bias=b, **how)
    assert merge_token_stats(parts, y).rank.tolist() == whole.rank.tolist()


def test_the_design_of_targets_is_that_of_the_sums(monkeypatch):
    """Chosen for the same call: with the temperature, if there is one."""
    from autodeco_fast.ops import token_stats as op

    monkeypatch.setattr(op, "streaming_pays", lambda *_, scaled: not scaled)
    h, w, _, y = case(4, 64, 50, torch.bfloat16)
    at = {"first_id": 0, "backend": "triton"}
    exact = target_logits(h, w, y, **at, fused=True)
    rounded = target_logits(h, w, y, **at, fused=False)
    assert not torch.equal(exact, rounded)
    assert torch.equal(rounded, exact.bfloat16().float())
    assert torch.equal(target_logits(h, w, y, **at), exact)
    assert torch.equal(target_logits(h, w, y, **at, temperature=torch.ones(4)), rounded)
