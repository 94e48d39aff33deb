"""`sample` against masked Gumbel-max in fp64 on the same integers, and against the distribution it
claims."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import MinPLogitsWarper, TemperatureLogitsWarper

import autodeco_fast
from autodeco_fast.sampling import SamplingParameters
from autodeco_fast.torch_backend import sample_loops
from autodeco_fast.torch_backend.sample_loops import philox4x32, uniform_bits
from tests.on_device import DEVICE, on_device, rows_far_apart, sample
from tests.reference.sampling import assert_same_tokens, gumbel, reference


def test_philox_known_answers():
    """Those of the authors' own test vectors."""

    def words(key, c):
        return [int(x) for x in philox4x32(key, c, c, c, c)]

    assert words(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words(-1, 0xFFFFFFFF) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_one_philox_serves_four_ids():
    """Their integers are its four words; other seeds, positions, streams and domains have
    others."""

    def words(*key):
        return [int(x) for x in philox4x32(*key)]

    assert uniform_bits(-7, 3, 5, np.arange(4, 8), 0).tolist() == words(-7, 1, 3, 5, 0)
    assert (
        uniform_bits(5, 2**32 - 1, 0, np.array([151935]), 0).tolist()
        == words(5, 151935 // 4, 2**32 - 1, 0, 0)[3:]
    )
    others = [(5, 3, 5, 0), (-7, 4, 5, 0), (-7, 3, 6, 0), (-7, 3, 5, 1)]
    assert len({int(uniform_bits(*key[:3], 4, key[3])) for key in [(-7, 3, 5, 0), *others]}) == 5


@pytest.mark.parametrize("min_p", [0.0, 1e-4, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("V", [1, 999, 2048, 5000])
def test_token_for_token(V, min_p, backend):
    z = torch.randn(12, V, generator=torch.Generator().manual_seed(V)) * 3
    T = torch.tensor([0.0, 0.05, 0.7, 1.0, 2.0, 1.0]).repeat(2)
    out = sample(z, T, min_p=min_p, seed=5, position=3, backend=backend)
    assert_same_tokens(out.token, *reference(z, T, min_p, 5, 3))
    assert out.status.tolist() == [0] * 12


@pytest.mark.parametrize("V", [32000, 151936, 262144])
def test_large_vocabularies(V):
    z = torch.randn(4, V, generator=torch.Generator().manual_seed(1)) * 2
    T = torch.tensor([0.5, 1.0, 1.5, 2.0])
    for min_p in (0.0, 0.1):
        assert_same_tokens(sample(z, T, min_p=min_p, seed=9).token, *reference(z, T, min_p, 9))


@settings(max_examples=25)
@given(
    st.integers(1, 5),
    st.integers(1, 3000),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(["torch", "triton"]),
)
def test_any_shape(B, V, min_p, backend):
    z = torch.randn(B, V, generator=torch.Generator().manual_seed(B * V))
    T = torch.linspace(0.1, 2.0, B)
    assert_same_tokens(
        sample(z, T, min_p=min_p, seed=V, backend=backend).token, *reference(z, T, min_p, V)
    )


def test_logprob_and_kept(backend):
    z = torch.randn(5, 400) * 3
    T = torch.tensor([0.3, 0.7, 1.0, 1.5, 2.0])
    asked = dict(return_logprob=True, return_kept=True, return_full_logprob=True)
    out = sample(z, T, min_p=0.05, seed=1, backend=backend, **asked)
    p = (z.double() / T[:, None]).softmax(-1)
    kept = p >= 0.05 * p.amax(-1, keepdim=True)
    q = torch.where(kept, p, 0.0)
    q /= q.sum(-1, keepdim=True)
    assert out.kept.tolist() == kept.sum(-1).tolist()
    torch.testing.assert_close(
        out.logprob.double(), q.gather(1, out.token[:, None])[:, 0].log(), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        out.full_logprob.double(), p.gather(1, out.token[:, None])[:, 0].log(), rtol=0, atol=1e-5
    )
    plain = sample(z, T, min_p=0.05, seed=1, backend=backend)
    assert torch.equal(plain.token, out.token)
    assert plain.logprob is plain.kept is plain.full_logprob is None


def test_does_not_depend_on_the_batch(backend):
    z = torch.randn(6, 1500)
    seeds = torch.arange(6) + 100
    together = sample(z, 1.0, min_p=0.01, seed=seeds, backend=backend).token
    alone = torch.cat(
        [
            sample(z[i : i + 1], 1.0, min_p=0.01, seed=seeds[i : i + 1], backend=backend).token
            for i in range(6)
        ]
    )
    padded = torch.nn.functional.pad(z, (0, 700), value=-float("inf"))
    assert torch.equal(together, alone)
    assert torch.equal(together, sample(padded, 1.0, min_p=0.01, seed=seeds, backend=backend).token)
    assert torch.equal(
        together.flip(0),
        sample(z.flip(0), 1.0, min_p=0.01, seed=seeds.flip(0), backend=backend).token,
    )


def test_does_not_depend_on_the_tile():
    from autodeco_fast.kernels.sample import sample as kernel_sample

    run = on_device(kernel_sample)
    z, B = torch.randn(3, 1000), 3
    parameters = SamplingParameters(
        temperature=torch.ones(B), min_p=torch.full((B,), 0.05), seed=torch.full((B,), 7)
    )
    tokens = [
        run(z, parameters, tile=tile, splits=splits).token
        for tile, splits in ((128, None), (128, 3), (128, 1), (1024, 1))
    ]
    assert all(torch.equal(tokens[0], t) for t in tokens[1:])


def test_broken_rows_are_reported_and_leave_others_alone(backend):
    z = torch.randn(6, 300)
    clean = sample(z, 1.0, min_p=0.1, seed=2, backend=backend)
    z[0, 5] = float("nan")
    z[1, 6] = float("inf")
    z[2] = -float("inf")
    z[3] = float("nan")
    out = sample(
        z,
        1.0,
        min_p=0.1,
        seed=2,
        backend=backend,
        return_kept=True,
        return_logprob=True,
        return_full_logprob=True,
    )
    assert out.status.tolist() == [1, 2, 4, 5, 0, 0]
    assert ((out.token >= 0) & (out.token < 300)).all()
    assert out.kept[2:4].tolist() == [0, 0]
    assert out.logprob[2:4].tolist() == out.full_logprob[2:4].tolist() == [0, 0]
    assert out.token[4:].tolist() == clean.token[4:].tolist()


def test_half_precision_and_ties(backend):
    z = torch.randn(4, 700).bfloat16()
    T = torch.full((4,), 0.8)
    assert_same_tokens(
        sample(z, T, min_p=0.1, seed=3, backend=backend).token, *reference(z, T, 0.1, 3)
    )
    assert sample(torch.zeros(2, 50), 0.0, seed=0, backend=backend).token.tolist() == [0, 0]


@pytest.mark.parametrize("programs", [1, 2])
def test_ties_go_to_the_lowest_id_whoever_looks_at_it(programs, monkeypatch):
    """Sub-tile 64 is looked at before sub-tile 1, by the same program or by another."""
    from autodeco_fast.kernels import sample as kernel

    monkeypatch.setattr(kernel, "DRAWING", programs)
    z = torch.full((1, 65 * 256), -9.0)
    z[0, 300:302] = z[0, 64 * 256 :] = 0.0
    out = on_device(kernel.sample)(z, SamplingParameters(0.0))
    assert out.token.tolist() == [300]


def p_value(
    kind: str, T: float, min_p: float, believed_T: float, believed_min_p: float, draws: int = 40_000
) -> float:
    """Chi-square of `draws` draws against softmax(z/T) cut at Min-P; ids are pooled to at least 20
    expected draws.

    Two ids share the largest logit and one is 0.02 below, so that no cut and no temperature leaves
    a single token, whose law nothing could miss.
    """
    g = torch.Generator().manual_seed(0)
    z = {"peaked": 6.0, "normal": 2.0, "flat": 0.1}[kind] * torch.randn(1, 300, generator=g)
    z[0, 7], z[0, 123] = z.max(), z.max() - 0.02
    token = sample(z.expand(draws, -1), T, min_p=min_p, seed=17).token
    p = (z[0].double() / believed_T).softmax(-1)
    p = torch.where(p >= believed_min_p * p.max(), p, 0.0)
    p, order = (p / p.sum()).sort(descending=True)
    counts = torch.bincount(token, minlength=300)[order].double()
    if counts[p == 0].any():
        return 0.0
    bins = ((p.cumsum(0) - p / 2) * 60).long().clamp(max=59)  # the sum can round to 1
    expected = torch.zeros(60, dtype=torch.float64).index_add_(0, bins, p * draws)
    seen = torch.zeros(60, dtype=torch.float64).index_add_(0, bins, counts)
    filled = expected >= 20
    assert filled.sum() > 1
    expected, seen = expected[filled], seen[filled]
    return float(chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("kind", ["peaked", "normal", "flat"])
@pytest.mark.parametrize("T", [0.05, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("min_p", [0.0, 1e-4, 0.05, 0.5, 1.0])
def test_distribution(kind, T, min_p):
    assert p_value(kind, T, min_p, T, min_p) > 1e-6 / 60


def test_distribution_control():
    """The chi-square sees a temperature 2 % off and a cut 0.05 off."""
    assert p_value("normal", 1.0, 0.0, 1.0, 0.0, 120_000) > 1e-6 / 60
    assert p_value("normal", 1.0, 0.0, 1.02, 0.0, 120_000) < 1e-6 / 60
    assert p_value("normal", 1.0, 0.05, 1.0, 0.10) < 1e-6 / 60


def sample_with_noise_of_24_bits(folder: Path, monkeypatch) -> None:
    """From here on the torch backend's loops are compiled with uniforms that end where those of 24
    bits do: their noise ends at 16.6."""
    source = Path(sample_loops.__file__).read_text()
    ends = "return max(min((np.float32(r) + _HALF_STEP) * _TINY, _BELOW_ONE), np.float32(2.0**-24))"
    broken = source.replace("return min((np.float32(r) + _HALF_STEP) * _TINY, _BELOW_ONE)", ends)
    assert broken.count(ends) == 1
    path = folder / "loops_of_24_bits.py"
    path.write_text(broken)
    name = "autodeco_fast.torch_backend.loops_of_24_bits"
    spec = importlib.util.spec_from_file_location(name, path)
    loops = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loops)
    monkeypatch.setattr("autodeco_fast.torch_backend.sample.sample_rows", loops.sample_rows)


@pytest.mark.slow
def test_far_tail_and_its_control(tmp_path, monkeypatch):
    """200,000 tokens 17.5 below one head token hold 200000·e^−17.5 / (1 + 200000·e^−17.5) =
    0.004997 of the mass: of 8,000 draws 40.0, and 5 σ is 31.6."""
    z = torch.full((1, 200_001), -17.5)
    z[0, 0] = 0.0
    rows = z.expand(500, -1).contiguous()

    def hits(seed, stream):
        z = rows[: len(stream)]
        return sample(z, 1.0, seed=seed, stream=stream, backend="torch").token > 0

    every = torch.arange(500)
    found = [(seed, i) for seed in range(16) for i in every[hits(seed, every)].tolist()]
    assert abs(len(found) - 40.0) < 31.6
    again = torch.tensor(found).T
    assert hits(*again).all()
    # Noise that ends sooner is nowhere larger, so no other draw can fall on the tail.
    sample_with_noise_of_24_bits(tmp_path, monkeypatch)
    assert abs(int(hits(*again).sum()) - 40.0) > 31.6


@pytest.mark.parametrize("kind", ["peaked", "normal", "flat"])
def test_other_samplers_keep_the_same(kind):
    """transformers' warpers and vLLM's rule (p ≥ min_p · max p of softmax(z/T)) cut where `sample`
    does."""
    z = {"peaked": 6.0, "normal": 2.0, "flat": 0.1}[kind] * torch.randn(
        4, 500, generator=torch.Generator().manual_seed(3)
    )
    for T, min_p in ((0.3, 0.1), (1.0, 0.05), (1.7, 0.5)):
        out = sample(z, T, min_p=min_p, seed=0, return_kept=True)
        warped = MinPLogitsWarper(min_p)(None, TemperatureLogitsWarper(T)(None, z.clone()))
        p = (z / T).softmax(-1)
        vllm = p >= min_p * p.amax(-1, keepdim=True)
        assert out.kept.tolist() == warped.isfinite().sum(-1).tolist() == vllm.sum(-1).tolist()
        assert vllm.gather(1, out.token[:, None]).all()


def exact_gumbel(r: np.ndarray) -> np.ndarray:
    """fp64 noise of 32-bit integers."""
    u = np.minimum((r.astype(np.float64) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -np.log(-np.log1p(-u))


def test_the_tail_of_the_noise_is_exact():
    """Large noise comes from small integers; there fp32 must not round the steps between them
    away."""
    r = np.concatenate(
        [np.arange(20_000), np.arange(0, 2**32, 99_991), 2**32 - 1 - np.arange(500)]
    ).astype(np.uint32)
    ours = gumbel(r)
    error = np.abs(ours - exact_gumbel(r))
    assert error[r < 0.9 * 2**32].max() < 4e-6
    assert error.max() < 0.05  # u near 1: noise about −2, which wins nothing
    assert ours.max() > 22.8
    assert (
        len(np.unique(ours[:20_000])) > 19_000
    )  # neighbours that differ by less than an fp32 step may meet
    naive = -np.log(-np.log1p(-((r >> 8).astype(np.float64) + 0.5) * 2.0**-24))
    assert np.abs(naive - exact_gumbel(r)).max() > 1  # the control: 24 bits


def test_offsets_beyond_32_bits(backend):
    """Three rows 2³⁰ logits apart."""
    near = (torch.randn(3, 5000) * 3).half().to(DEVICE)
    far = rows_far_apart(near, 2**30)
    asked = dict(min_p=0.01, seed=3, return_kept=True, backend=backend)
    ours, expected = (autodeco_fast.sample(z, 0.8, **asked) for z in (far, near))
    assert ours.token.tolist() == expected.token.tolist()
    assert ours.kept.tolist() == expected.kept.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_reads_its_parameters_when_it_is_replayed():
    z = torch.randn(6, 5000, device="cuda") * 3
    T, seed, position = (
        torch.full((6,), 0.9, device="cuda"),
        torch.arange(6, device="cuda"),
        torch.zeros(6, device="cuda").long(),
    )

    def run():
        return autodeco_fast.sample(z, T, min_p=0.02, seed=seed, position=position).token

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = run()
    for step in range(5):
        position.fill_(step)
        seed.add_(3)
        T.mul_(1.1)
        z.normal_()
        graph.replay()
        assert token.tolist() == run().tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("B", [1, 64])
def test_draws_that_follow_each_other_closely(B):
    """Each waits for its own maxima (kernels/dependent_launch.py): the logits are others every
    time, in the same memory, and the host waits for none."""
    z, T = torch.empty(B, 150_000, device="cuda"), torch.full((B,), 0.8, device="cuda")

    def filled(seed):
        return z.normal_(generator=torch.Generator("cuda").manual_seed(seed)).mul_(3)

    def draw(seed, backend):
        return autodeco_fast.sample(filled(seed), T, min_p=0.05, seed=seed, backend=backend).token

    drawn = [draw(seed, "triton") for seed in range(50)]
    assert [x.tolist() for x in drawn] == [draw(seed, "torch").tolist() for seed in range(50)]


def test_compiles_without_a_break():
    z = torch.randn(3, 100)
    compiled = torch.compile(
        lambda a: sample(a, 0.7, min_p=0.1, seed=4, backend="torch"),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(z).token, sample(z, 0.7, min_p=0.1, seed=4).token)


@pytest.mark.parametrize(
    ("logits", "options", "words"),
    [
        (torch.zeros(3), {}, r"logits must be \[B, V\]"),
        (torch.zeros(1, 3), {"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
        (torch.zeros(1, 3).long(), {}, "logits must be bfloat16"),
        (
            torch.zeros(2, 3),
            {"position": torch.zeros(3).long()},
            r"position must be a scalar or \[2\]",
        ),
        (torch.zeros(2, 3), {"backend": "cuda"}, "backend must be None"),
    ],
)
def test_says_what_is_wrong(logits, options, words):
    with pytest.raises(ValueError, match=words):
        sample(logits, 1.0, seed=0, **options)
