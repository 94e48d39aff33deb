"""The head against fp64 autograd, on both backends; its folder on disk."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeco_fast import TemperatureHead
from autodeco_fast.ops import temperature_head as op
from autodeco_fast.torch_backend import temperature_head as torch_backend
from tests.on_device import temperature_head


def make(N, H, F, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed + N + H + F)

    def r(*s):
        return torch.randn(*s, generator=g)

    return r(N, H).to(dtype), r(F, H) / H**0.5, r(F) * 0.1, r(1, F) / F**0.5, r(1)


def reference(h, w1, b1, w2, b2):
    """In the dtype of its arguments."""
    return 2.0 * torch.sigmoid(torch.relu(h @ w1.T + b1) @ w2[0] + b2)


@pytest.mark.parametrize(
    "N, H, F", [(1, 8, 16), (5, 33, 20), (70, 64, 256), (130, 100, 70), (0, 8, 16)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(N, H, F, dtype, backend):
    args = make(N, H, F, dtype)
    T = temperature_head(*args, backend=backend)
    assert T.dtype == torch.float32
    exact = reference(*(a.double() for a in args))
    same = reference(*(a.to(dtype) for a in args)).double()
    error = (T.double() - exact).abs().max() if N else 0
    assert error <= 2 * ((same - exact).abs().max() if N else 0) + 1e-6


@pytest.mark.parametrize("N, H, F", [(1, 8, 16), (70, 33, 40)])
@pytest.mark.parametrize("need_hidden", [False, True])
def test_backward(N, H, F, need_hidden, backend):
    args = make(N, H, F)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1))
    exact = [a.double().requires_grad_() for a in args]
    (reference(*exact) * weights.double()).sum().backward()
    ours = [a.clone().requires_grad_(need_hidden or i > 0) for i, a in enumerate(args)]
    (temperature_head(*ours, backend=backend) * weights).sum().backward()
    for i, (a, b) in enumerate(zip(ours, exact)):
        if i == 0 and not need_hidden:
            assert a.grad is None
        else:
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7, 0.0], ids="dT={}".format)
def test_fp16_keeps_small_gradients(size, backend):
    """Those of a mean over many tokens: da is smaller than any fp16 number. Of h, whose gradient
    is fp16 itself, as autograd's of fp32 rounded once."""
    args = make(70, 24, 20, torch.float16)
    dT = torch.randn(70, generator=torch.Generator().manual_seed(1)) * size
    exact = [a.double().requires_grad_() for a in args]
    wanted = torch.autograd.grad(reference(*exact), exact, dT.double())
    ours = [a.clone().requires_grad_() for a in args]
    got = torch.autograd.grad(temperature_head(*ours, backend=backend), ours, dT)
    for x, want in zip(got[1:], wanted[1:]):
        assert x.dtype == torch.float32
        assert (x.double() - want).norm() <= 2e-3 * want.norm()
    error = got[0].double() - wanted[0].half().double()
    assert error.norm() <= 2e-3 * wanted[0].norm() + 70**0.5 * 24**0.5 * 2.0**-24


def test_fp16_gradients_of_many_rows_do_not_overflow():
    """Triton: a sum over rows is larger than fp16's largest number."""
    h = torch.full((2048, 8), 60.0, dtype=torch.float16)
    w1, b1, w2, b2 = torch.full((16, 8), 1e-3), torch.ones(16), torch.full((1, 16), 1e-3), [0.0]
    weights = [x.requires_grad_() for x in (w1, b1, w2, torch.tensor(b2))]
    (got,) = torch.autograd.grad(temperature_head(h, *weights, backend="triton").sum(), w1)
    (want,) = torch.autograd.grad(temperature_head(h, *weights, backend="torch").sum(), w1)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_many_to_keep_the_hidden_layer(dtype):
    N = torch_backend.KEEP + 3
    args = [a.to(dtype) if i == 0 else a for i, a in enumerate(make(N, 8, 16))]
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1))
    whole = [a.clone().requires_grad_(i > 0) for i, a in enumerate(args)]
    parts = [a.clone().requires_grad_(i > 0) for i, a in enumerate(args)]
    T = temperature_head(*whole, backend="torch")
    (T * weights).sum().backward()
    for rows in (slice(0, 1000), slice(1000, N)):
        (
            temperature_head(parts[0][rows], *parts[1:], backend="torch") * weights[rows]
        ).sum().backward()
    for a, b in zip(whole[1:], parts[1:]):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("N", [3, torch_backend.CHUNK + 1])
def test_autocast_changes_nothing(N):
    """Forward and backward inside it, to the bit; without a gradient too."""
    values = []
    for enabled in (False, True):
        args = [a.requires_grad_() for a in make(N, 8, 16)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            T = op.temperature_head(*args, backend="torch")
            T.sum().backward()
            with torch.no_grad():
                values.append([op.temperature_head(*args), T, *(a.grad for a in args)])
    for plain, inside in zip(*values):
        assert plain.dtype == torch.float32
        assert torch.equal(plain, inside)


def test_expanded_gradient(backend):
    args = [a.requires_grad_() for a in make(6, 8, 16)]
    temperature_head(
        *args, backend=backend
    ).sum().backward()  # the gradient is one number, expanded
    exact = [a.detach().double().requires_grad_() for a in args]
    reference(*exact).sum().backward()
    torch.testing.assert_close(args[1].grad.double(), exact[1].grad, rtol=1e-5, atol=1e-6)


def test_gradcheck():
    args = [a.double().requires_grad_() for a in make(3, 5, 7)]
    assert torch.autograd.gradcheck(lambda *a: temperature_head(*a, backend="torch"), args)


@settings(max_examples=15)
@given(
    st.integers(1, 80), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["torch", "triton"])
)
def test_any_shape(N, H, F, backend):
    args = make(N, H, F)
    exact = reference(*(a.double() for a in args))
    torch.testing.assert_close(
        temperature_head(*args, backend=backend).double(), exact, rtol=0, atol=2e-6
    )


def test_any_leading_shape_and_strides(backend):
    h, *w = make(24, 8, 16)
    T = temperature_head(h.view(2, 3, 4, 8), *w, backend=backend)
    assert T.shape == (2, 3, 4)
    strided = torch.stack([h, h], 1)[:, 0]
    torch.testing.assert_close(temperature_head(strided, *w, backend=backend), T.flatten())


def test_compiles_without_a_break():
    head = TemperatureHead(8, 16)
    h = torch.randn(5, 8)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    compiled(h).sum().backward()
    torch.testing.assert_close(compiled(h), head(h))
    assert head.mlp[2].bias.grad is not None


def test_starts_in_the_middle_and_names_its_parameters():
    head = TemperatureHead(8)
    assert head(torch.randn(3, 8)).tolist() == [1.0, 1.0, 1.0]
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {
        "mlp.0.weight": (256, 8),
        "mlp.0.bias": (256,),
        "mlp.2.weight": (1, 256),
        "mlp.2.bias": (1,),
    }


def test_offset_moves_and_clips():
    assert TemperatureHead(8, offset=0.25)(torch.randn(1, 8)).item() == 1.25
    assert TemperatureHead(8, offset=-3.0)(torch.randn(1, 8)).item() == 0.0


def test_round_trip(tmp_path):
    head = TemperatureHead(8, 16, 1.5, offset=0.1)
    torch.nn.init.normal_(head.mlp[2].weight)
    head.save_pretrained(tmp_path / "a")
    again = TemperatureHead.from_pretrained(tmp_path / "a")
    h = torch.randn(4, 8)
    assert torch.equal(head(h), again(h))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "autodeco_config.json",
        "head.safetensors",
    ]


def test_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="hidden has width 9, the head was made for 8"):
        TemperatureHead(8)(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="which is no folder"):
        TemperatureHead.from_pretrained(tmp_path / "none")
    folder = tmp_path / "head"
    TemperatureHead(8).save_pretrained(folder)
    (folder / "head.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        TemperatureHead.from_pretrained(folder)
    (folder / "autodeco_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no autodeco_config\.json"):
        TemperatureHead.from_pretrained(folder)
