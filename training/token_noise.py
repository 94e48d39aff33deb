"""Random numbers that belong to a token, not to a moment: the same in any batch, on any number of
processes, after a resume."""

import torch

from autodeco_fast.torch_backend.sample_loops import uniform_bits

_DOMAIN = 1  # 0 is the sampler's


def uniform(seed: int, epoch: int, document: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """`[N]` fp64 in [0, 1), from Philox4x32-10 of (seed, position, epoch, document)."""
    key = (seed + 2**63) % 2**64 - 2**63
    first_of_four = (
        4 * position.cpu().numpy()
    )  # one Philox makes the words of four neighbours; a position takes the first
    word = uniform_bits(key, epoch, document.cpu().numpy(), first_of_four, _DOMAIN)
    return torch.from_numpy(word.astype("float64") * 2.0**-32).to(document.device)
