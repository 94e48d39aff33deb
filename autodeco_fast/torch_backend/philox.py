"""Philox4x32-10 and the Gumbel noise made from it, in torch: the integers are those of `kernels/philox.py`."""

import torch

_MASK = 0xFFFFFFFF
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(key: torch.Tensor, counter: tuple[torch.Tensor | int, ...]) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        key: 64-bit keys, int64, any shape.
        counter: four 32-bit words, int64 tensors in `[0, 2**32)` or ints, that broadcast with `key`.

    Returns:
        Four int64 tensors with values in `[0, 2**32)`.
    """
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = c0 * _ROUND[0], c2 * _ROUND[1]  # wraps modulo 2**64; bits 32..63 are still right
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform_bits(
    seed: torch.Tensor, position: torch.Tensor, stream: torch.Tensor, ids: torch.Tensor, domain: int = 0
) -> torch.Tensor:
    """The 32-bit integer of each token id, int64 in `[0, 2**32)`; all int64, broadcast together."""
    words = philox4x32(seed, (ids // 4, position & _MASK, stream & _MASK, torch.full_like(ids, domain)))
    return torch.stack(torch.broadcast_tensors(*words)).gather(0, (ids % 4).expand_as(words[0])[None])[0]


def gumbel(
    seed: torch.Tensor, position: torch.Tensor, stream: torch.Tensor, ids: torch.Tensor, domain: int = 0
) -> torch.Tensor:
    """Gumbel noise of each token id, fp32: `−log(−log1p(−u))`, `u = (r + ½)·2⁻³²` kept below 1."""
    bits = uniform_bits(seed, position, stream, ids, domain)
    u = ((bits.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
