"""A cut as −inf: for sampling steps that are not ours."""

import torch

from autodeco_fast.policies.base import Cut


def masked(scaled: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Logits over T, `[B, V]` fp32, with −inf outside a cut: the kept set that `sample` draws from.

    The largest logit of a row always stays.
    """
    z = scaled if cut.logits is None else cut.logits
    top = z.amax(1, keepdim=True)
    tau = torch.full_like(top, -torch.inf)
    if cut.top_k is not None or cut.top_p is not None:
        down = z.sort(1, descending=True).values
        rank = torch.arange(z.shape[1], device=z.device)
        inside = torch.ones_like(down, dtype=torch.bool)
        if cut.top_k is not None:
            k = torch.as_tensor(cut.top_k, device=z.device).reshape(-1, 1)
            kth = down.gather(1, (k.clamp(1, z.shape[1]) - 1).expand(z.shape[0], 1))
            inside = (down >= kth) | (k == 0)
        if cut.top_p is not None:
            top_p = torch.as_tensor(cut.top_p, device=z.device).reshape(-1, 1)
            p = down.masked_fill(~inside, -torch.inf).softmax(1)
            # The sums of tails round to 1, and 1 cuts nothing.
            inside &= (p.cumsum(1) - p < top_p) | (top_p >= 1) | (rank == 0)
        tau = down.gather(1, inside.sum(1, keepdim=True) - 1)
    least = torch.as_tensor(cut.min_p, device=z.device, dtype=torch.float32).log().reshape(-1, 1)
    return z.masked_fill(z < tau.maximum(top + least), -torch.inf)
