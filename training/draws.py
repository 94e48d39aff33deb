"""Random numbers that belong to a token, not to a moment: the same in any batch, on any number of processes, after a resume."""

import torch

from autodeco_fast.torch_backend.philox import philox4x32

_DOMAIN = 1  # 0 is the sampler's


def uniform(seed: int, epoch: int, document: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """`[N]` fp64 in [0, 1), from Philox4x32-10 of (seed, position, epoch, document)."""
    word = philox4x32(seed, position.cpu().numpy(), epoch, document.cpu().numpy(), _DOMAIN)[0]
    return torch.from_numpy(word.astype("float64") * 2.0**-32).to(document.device)
