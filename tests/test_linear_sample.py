"""`linear_sample` against masked Gumbel-max on fp64 logits, against `sample`, and for what it holds
in memory."""

import pytest
import torch
import triton
import triton.language as tl

import autodeco_fast
from autodeco_fast.kernels.lm_head_tiles import product_tile as kernel_logits
from autodeco_fast.lm_head import transform_
from autodeco_fast.sampling import FULL_LOGPROB, SamplingParameters
from tests.allocations import LargestAllocation
from tests.on_device import DEVICE, on_device, sample
from tests.reference.sampling import reference

linear_sample = on_device(autodeco_fast.linear_sample)


def case(B: int, H: int, V: int, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(B + H + V)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    return r(B, H).to(dtype), (r(V, H) * (2 / H**0.5)).to(dtype), r(V).to(dtype)


def exact(h, w, b=None, scale=1.0, softcap=None):
    z = (h.double() @ w.double().T + (0 if b is None else b.double())) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@pytest.mark.parametrize(
    "B, H, V", [(1, 40, 500), (5, 72, 999), (17, 64, 200), (70, 32, 130), (512, 8, 70)]
)
@pytest.mark.parametrize(
    "transform", [{}, {"logit_scale": 0.5, "softcap": 3.0}], ids=["plain", "transformed"]
)
@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.6])
def test_token_for_token(B, H, V, transform, min_p, backend):
    if backend == "triton" and DEVICE == "cpu":
        B = min(B, 130)  # three tiles of rows: the interpreter runs a program a row
    h, w, b = case(B, H, V)
    b = b if transform else None
    T = torch.linspace(0, 2, B) if B > 1 else torch.tensor([1.3])
    out = linear_sample(
        h, w, T, bias=b, **transform, min_p=min_p, seed=5, position=2, fused=True, backend=backend
    )
    z = exact(h, w, b, transform.get("logit_scale", 1.0), transform.get("softcap"))
    want, margin = reference(z, T, min_p, 5, 2)
    clear = margin > 1e-4
    assert clear.float().mean() > 0.9
    assert out.token[clear].tolist() == want[clear].tolist()
    assert out.status.tolist() == [0] * B
    assert out.logprob is out.kept is None


@pytest.mark.parametrize("transformed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, transformed, backend):
    """The token of logits that are rounded between bias and scale, as a model's are: greedy rows
    take the first that tie then."""
    h, w, b = case(96, 48, 300, dtype)
    h[:, 0], w[:, 0] = 1, 300 if dtype == torch.bfloat16 else 3000  # where numbers are 2 apart
    b = b if transformed else None
    scale, softcap = (0.5, 5000.0) if transformed else (1.0, None)
    T = torch.tensor([0.0, 0.7, 1.0, 2.0]).repeat(24)
    noise = {"min_p": 0.2, "seed": 3, "backend": backend}
    out = linear_sample(h, w, T, bias=b, logit_scale=scale, softcap=softcap, fused=True, **noise)
    z = exact(h, w, b)
    made, unrounded = (
        sample(transform_(some, scale, softcap), T, **noise).token
        for some in (z.to(dtype), z.float())
    )
    assert (out.token == made).float().mean() > 0.97  # sums of another order may round apart
    assert (out.token == unrounded).float().mean() < 0.9
    z = exact(h, w, b, scale, softcap)
    gap = z.amax(-1) - z.gather(1, out.token[:, None])[:, 0]
    assert (gap <= T * torch.tensor(5.0).log() + 2 * scale).all()  # two halves of a step of 2


def test_does_not_depend_on_the_splits():
    from autodeco_fast.kernels.linear_sample import linear_sample as kernel

    run = on_device(kernel)
    h, w, _ = case(33, 24, 700)
    T = torch.rand(33, generator=torch.Generator().manual_seed(0)) * 2
    parameters = SamplingParameters(temperature=T, min_p=0.4, seed=7, stream=None)
    results = [
        run(h, w, None, 1.0, None, parameters, splits=s).token.tolist() for s in (1, 2, 5, 11)
    ]
    assert results[0] == results[1] == results[2] == results[3]


def test_does_not_depend_on_the_chunks(monkeypatch):
    from autodeco_fast.torch_backend import linear_sample as torch_backend

    h, w, _ = case(40, 24, 700)
    T = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 2
    parameters = SamplingParameters(temperature=T, min_p=0.4, seed=7, stream=None)
    call = h, w, None, 1.0, None, parameters
    whole = torch_backend.linear_sample(*call, want=FULL_LOGPROB)
    monkeypatch.setattr(torch_backend, "CHUNK", 0)
    monkeypatch.setattr(torch_backend, "COLUMNS", 100)
    chunked = torch_backend.linear_sample(*call, want=FULL_LOGPROB)
    assert whole.token.tolist() == chunked.token.tolist()
    torch.testing.assert_close(whole.full_logprob, chunked.full_logprob)


@triton.jit
def _store_logits(
    x_ptr, w_ptr, z_ptr, B, V, H,
    rows: tl.constexpr, block: tl.constexpr, step: tl.constexpr, upcast: tl.constexpr,
    backwards: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if backwards:
        tile = tl.num_programs(0) - 1 - tile
    b_z = kernel_logits(
        x_ptr, w_ptr, None, 0, tile, B, V, H, H, H, 1.0, None, rows, block, step, upcast
    )
    o_b, o_v = tl.arange(0, rows)[:, None], tile * block + tl.arange(0, block)[None, :]
    tl.store(z_ptr + o_b * V + o_v, b_z, mask=(o_b < B) & (o_v < V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_multiplied_again_is_the_same_bit_for_bit(dtype):
    """What the second look relies on: the logits depend on tile shape and order along H, not on
    pipeline or program."""
    from autodeco_fast.kernels.linear_sample import BLOCK, DEPTH_H, tile_shape

    h, w, _ = (t.to(DEVICE) for t in case(40, 200, 300, dtype))
    rows, warps, stages = tile_shape(40)
    first, again = torch.empty(2, 40, 300, device=DEVICE)
    for z, depth, backwards in ((first, stages, False), (again, 2, True)):
        shape = rows, BLOCK, DEPTH_H, dtype == torch.bfloat16 and DEVICE == "cpu"
        options = {"num_warps": warps, "num_stages": depth}
        _store_logits[(triton.cdiv(300, BLOCK),)](
            h, w, z, 40, 300, 200, *shape, backwards, **options
        )
    assert torch.equal(first, again)
    torch.testing.assert_close(first.double().cpu(), exact(h.cpu(), w.cpu()), rtol=0, atol=1e-4)


def test_small_logits_are_made_and_large_ones_are_not():
    from autodeco_fast.ops.linear_sample import fused_pays

    assert fused_pays(32, 151_936, "triton")
    assert not fused_pays(64, 151_936, "triton")
    assert not fused_pays(64, 151_936, "torch")
    assert fused_pays(256, 151_936, "torch")


def test_full_logprob(backend):
    h, w, _ = case(6, 16, 300)
    T = torch.tensor([0.0, 0.4, 0.7, 1.0, 1.5, 2.0])
    out = linear_sample(
        h, w, T, min_p=0.1, seed=1, return_full_logprob=True, fused=True, backend=backend
    )
    p = (
        (exact(h, w) / T.clamp(min=1e-3)[:, None])
        .log_softmax(-1)
        .gather(1, out.token[:, None])[:, 0]
    )
    torch.testing.assert_close(out.full_logprob[1:].double(), p[1:], rtol=0, atol=2e-5)
    assert out.full_logprob[0] == 0


def test_broken_rows_are_reported(backend):
    h, w, _ = case(4, 16, 200)
    h[1, 3] = float("nan")
    h[2, 0] = float("inf")
    clean = linear_sample(case(4, 16, 200)[0], w, 1.0, seed=2, fused=True, backend=backend)
    out = linear_sample(h, w, 1.0, seed=2, fused=True, backend=backend)
    assert out.status[[0, 3]].tolist() == [0, 0]
    assert out.status[1] == 5
    assert out.status[2] & 2
    assert out.token[[0, 3]].tolist() == clean.token[[0, 3]].tolist()
    assert ((out.token >= 0) & (out.token < 200)).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_full_logprob_is_of_the_rest_of_a_broken_row(broken, backend):
    h, w = torch.randn(3, 16), torch.randn(40, 16)
    bias = torch.zeros(40)
    bias[5] = broken
    options = {"seed": 1, "return_full_logprob": True, "backend": backend}
    fused, plain = (linear_sample(h, w, 0.8, bias=bias, fused=f, **options) for f in (True, False))
    assert fused.token.tolist() == plain.token.tolist()
    assert (plain.full_logprob < 0).all()
    torch.testing.assert_close(fused.full_logprob, plain.full_logprob, rtol=0, atol=1e-5)


def test_what_needs_logits_makes_them(backend):
    h, w, _ = case(5, 16, 300)
    options = {"min_p": 0.05, "top_k": 20, "seed": 3, "return_kept": True, "backend": backend}
    out = linear_sample(h, w, 0.9, **options)
    same = sample(h @ w.T, 0.9, **options)
    assert out.token.tolist() == same.token.tolist()
    assert out.kept.tolist() == same.kept.tolist()
    with pytest.raises(ValueError, match="fused must be None or False with top_k"):
        linear_sample(h, w, 0.9, **options, fused=True)


def test_never_holds_all_logits():
    from autodeco_fast.torch_backend.linear_sample import CHUNK

    h, w, _ = case(300, 8, 30_000)  # 9 million logits
    h, w = h.to(DEVICE), w.to(DEVICE)
    with LargestAllocation() as seen:
        autodeco_fast.linear_sample(h, w, 1.0, min_p=0.1, seed=0, fused=True)
    assert 0 < seen.numel <= CHUNK + 300


def test_compiles_without_a_break():
    h, w, _ = case(3, 8, 100)

    def call(a, b):
        return autodeco_fast.linear_sample(a, b, 0.7, min_p=0.1, seed=4, backend="torch").token

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(h, w), call(h, w))


def test_says_what_is_wrong():
    h, w, b = case(2, 8, 20)
    for arguments, words in (
        (
            (h, w[:, :7]),
            r"hidden and weight must be \[N, H\] and \[V, H\], got shapes \(2, 8\) and \(20, 7\)",
        ),
        ((h, w.bfloat16()), "weight must have the dtype of hidden"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_sample(*arguments, 1.0, seed=0)
    with pytest.raises(ValueError, match=r"bias must be \[20\]"):
        linear_sample(h, w, 1.0, bias=b[:3], seed=0)
