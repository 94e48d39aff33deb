"""What `kernels/quantized_head.py` leaves of a vocabulary, in fp64."""

import math

import torch

from autodeco_fast import QuantizedLMHead

GROUP = 4


def parts_of(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of rows h: k, p, s and f of h = k·(p + s/256) + f."""
    k = torch.exp2(torch.ceil(torch.log2(h.abs().amax(1, keepdim=True) / 127)).clamp(-100, 100))
    p = (h / k).add(0.5).floor().clamp(-127, 127)
    s = ((h - k * p) * 256 / k).add(0.5).floor().clamp(-127, 127)
    return k, p, s, h - k * (p + s / 256)


def bounds(h: torch.Tensor, head: QuantizedLMHead) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest that each logit can be, `[B, V]` both."""
    h = h.double()
    k, p, s, f = parts_of(h)
    z = k * (p + s / 256) @ (head.scale.double()[:, None] * head.codes.double()).T
    reach = h.norm(dim=1)[:, None] * head.radius.double()
    reach += f.norm(dim=1)[:, None] * head.length.double()
    return z - reach, z + reach


def listed(
    low: torch.Tensor, high: torch.Tensor, c: float, block: int, programs: int
) -> torch.Tensor:
    """`[V]` bool: tokens of rows that are drawn together whose exact logits are needed, from bounds
    of these; by so many programs, in tiles of `block`."""
    V = low.shape[1]
    programs = min(-(-V // block), programs)
    # Tile t is the one of program t % programs, after t - programs, …
    tiles = torch.nn.functional.pad(low, (0, -V % (block * programs)), value=-math.inf)
    tiles = tiles.unflatten(1, (-1, programs, block)).amax(3).cummax(1)[0].flatten(1)
    known = tiles.repeat_interleave(block, 1)[:, :V]
    open_here = (high >= known + c).any(0)
    groups = torch.nn.functional.pad(high, (0, -V % GROUP), value=-math.inf)
    groups = groups.unflatten(1, (-1, GROUP)).amax(2) >= low.amax(1, keepdim=True) + c
    return open_here & groups.any(0).repeat_interleave(GROUP)[:V]
