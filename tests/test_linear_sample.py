"""`linear_sample` against masked Gumbel-max on fp64 logits, against `sample`, and for what it holds in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import autodeco_fast
from tests.on_device import DEVICE, on_device, sample
from tests.test_min_p_sample import reference

linear_sample = on_device(autodeco_fast.linear_sample)


def case(B: int, H: int, V: int, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(B + H + V)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return r(B, H).to(dtype), (r(V, H) * (2 / H**0.5)).to(dtype), r(V).to(dtype)


def exact(h, w, b=None, scale=1.0, softcap=None):
    z = (h.double() @ w.double().T + (0 if b is None else b.double())) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@pytest.mark.parametrize("B, H, V", [(1, 40, 500), (5, 72, 999), (17, 64, 200), (70, 32, 130)])
@pytest.mark.parametrize("transform", [{}, {"logit_scale": 0.5, "softcap": 3.0}], ids=["plain", "transformed"])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 0.6])
def test_token_for_token(B, H, V, transform, min_p, backend):
    h, w, b = case(B, H, V)
    b = b if transform else None
    T = torch.linspace(0, 2, B) if B > 1 else torch.tensor([1.3])
    out = linear_sample(h, w, T, bias=b, **transform, min_p=min_p, seed=5, position=2, fused=True, backend=backend)
    z = exact(h, w, b, transform.get("logit_scale", 1.0), transform.get("softcap"))
    want, margin = reference(z, T, min_p, 5, 2)
    clear = margin > 1e-4
    assert clear.float().mean() > 0.9
    assert out.token[clear].tolist() == want[clear].tolist()
    assert out.status.tolist() == [0] * B
    assert out.logprob is out.kept is None


def test_does_not_depend_on_the_splits():
    from autodeco_fast.kernels.linear_sample import linear_sample as kernel

    run = on_device(kernel)
    h, w, _ = case(33, 24, 700)
    T = torch.rand(33, generator=torch.Generator().manual_seed(0)) * 2
    results = [run(h, w, None, 1.0, None, T, 0.4, 7, 0, None, splits=s)["token"].tolist() for s in (1, 2, 5, 11)]
    assert results[0] == results[1] == results[2] == results[3]


def test_does_not_depend_on_the_chunks(monkeypatch):
    from autodeco_fast.torch_backend import linear_sample as torch_backend

    h, w, _ = case(40, 24, 700)
    T = torch.rand(40, generator=torch.Generator().manual_seed(0)) * 2
    run = lambda: torch_backend.linear_sample(h, w, None, 1.0, None, T, 0.4, 7, 0, None, want=("full_logprob",))  # noqa: E731
    whole = run()
    monkeypatch.setattr(torch_backend, "CHUNK", 0)
    monkeypatch.setattr(torch_backend, "COLUMNS", 100)
    parts = run()
    assert whole["token"].tolist() == parts["token"].tolist()
    torch.testing.assert_close(whole["full_logprob"], parts["full_logprob"])


def test_a_product_done_again_is_the_same_bit_for_bit():
    """The second look trusts that the same tile shape and order along H give the same logits."""
    from autodeco_fast.torch_backend import linear_sample as torch_backend

    h, w, _ = case(30, 57, 300, torch.bfloat16)
    a, b = torch.empty(2, 30, 300, dtype=h.dtype)
    torch.mm(h, w.T, out=a)
    torch.mm(h, w.T, out=b)
    assert torch.equal(a, b)
    assert torch_backend.CHUNK >= torch_backend.COLUMNS


def test_full_logprob(backend):
    h, w, _ = case(6, 16, 300)
    T = torch.tensor([0.0, 0.4, 0.7, 1.0, 1.5, 2.0])
    out = linear_sample(h, w, T, min_p=0.1, seed=1, return_full_logprob=True, fused=True, backend=backend)
    p = (exact(h, w) / T.clamp(min=1e-3)[:, None]).log_softmax(-1).gather(1, out.token[:, None])[:, 0]
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


def test_what_needs_logits_makes_them(backend):
    h, w, _ = case(5, 16, 300)
    options = {"min_p": 0.05, "top_k": 20, "seed": 3, "return_kept": True, "backend": backend}
    out = linear_sample(h, w, 0.9, **options)
    same = sample(h @ w.T, 0.9, **options)
    assert out.token.tolist() == same.token.tolist()
    assert out.kept.tolist() == same.kept.tolist()
    with pytest.raises(ValueError, match="fused must be None or False with top_k"):
        linear_sample(h, w, 0.9, **options, fused=True)


class LargestAllocation(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for o in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(o, torch.Tensor):
                self.numel = max(self.numel, o.untyped_storage().nbytes() // 4)
        return out


def test_never_holds_all_logits():
    from autodeco_fast.torch_backend.linear_sample import CHUNK

    h, w, _ = case(300, 8, 30_000)  # 9 million logits
    h, w = h.to(DEVICE), w.to(DEVICE)
    with LargestAllocation() as seen:
        autodeco_fast.linear_sample(h, w, 1.0, min_p=0.1, seed=0, fused=True)
    assert 0 < seen.numel <= CHUNK + 300


def test_compiles_without_a_break():
    h, w, _ = case(3, 8, 100)
    call = lambda a, b: autodeco_fast.linear_sample(a, b, 0.7, min_p=0.1, seed=4, backend="torch").token  # noqa: E731
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(h, w), call(h, w))


def test_says_what_is_wrong():
    h, w, b = case(2, 8, 20)
    for arguments, words in (
        ((h, w[:, :7]), r"hidden and weight must be \[B, H\] and \[V, H\], got shapes \(2, 8\) and \(20, 7\)"),
        ((h, w.bfloat16()), "must both be bfloat16, float16 or float32"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_sample(*arguments, 1.0, seed=0)
    with pytest.raises(ValueError, match=r"bias must be \[20\]"):
        linear_sample(h, w, 1.0, bias=b[:3], seed=0)
