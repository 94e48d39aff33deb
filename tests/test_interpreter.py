"""Triton's interpreter with less work (`tests/interpreter.py`): launches still replace the language
and put it back."""

import pytest
import torch

from autodeco_fast import sample
from tests.on_device import DEVICE

tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="kernels run on the GPU")


def language() -> dict[str, object]:
    return {
        f"{where.__name__}.{name}": value
        for where in (tl, tl.tensor, tl.math)
        for name, value in vars(where).items()
    }


def test_a_launch_leaves_the_language_as_it_found_it():
    """After the first of a process, which leaves some of Triton's own behind."""
    z, options = torch.randn(2, 300), {"min_p": 0.1, "seed": 3}
    sample(z, 0.5, **options, backend="triton")
    before = language()
    token = sample(z, 1.0, **options, backend="triton").token
    after = language()
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] is not after[name]] == []
    assert torch.equal(token, sample(z, 1.0, **options, backend="torch").token)


def test_functions_of_triton_itself_are_interpreted_too():
    """`tl.sum` lies in another module than kernels look into."""
    from tests.interpreter import _patched

    sample(torch.randn(1, 300), 1.0, seed=3, backend="triton")
    assert _patched == {tl, tl.core}
