"""Uniforms that belong to a token, and generators' seeds that belong to a step, not to a moment.

They are the same in any batch, on any number of processes and after a resume.
"""

import hashlib

import torch

from autodeco_fast.torch_backend.sample_loops import uniform_bits

_DOMAIN = 1  # 0 is the sampler's
_EPOCH_OF_SCANS = 2**32 - 1  # epochs of training count from 0
_EPOCH_OF_SPLITS = 2**32 - 2


def mixed(*parts: object) -> int:
    """63 bits that depend on all the parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def token_uniform(
    seed: int, document: torch.Tensor, position: torch.Tensor, *, epoch: int
) -> torch.Tensor:
    """`[N]` fp64 in [0, 1), from Philox4x32-10 of (seed, position, epoch, document)."""
    key = (seed + 2**63) % 2**64 - 2**63
    # One Philox makes the words of four neighbours; a position takes the first of its four.
    first_of_four = 4 * position.cpu().numpy()
    word = uniform_bits(key, epoch, document.cpu().numpy(), first_of_four, _DOMAIN)
    return torch.from_numpy(word.astype("float64") * 2.0**-32).to(document.device)


def scan_uniform(seed: int, document: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """`[N]` fp64 in [0, 1): what a scan selects by."""
    return token_uniform(seed, document, position, epoch=_EPOCH_OF_SCANS)


def held_out(seed: int, document: torch.Tensor, fraction: float) -> torch.Tensor:
    """Which documents are measured on instead of learned from. bool `[N]`"""
    first = torch.zeros_like(document)
    return token_uniform(seed, document, first, epoch=_EPOCH_OF_SPLITS) < fraction
