"""T̂ and T* of a scan's tokens."""

import math

import numpy as np
import torch

from autodeco_fast import TemperatureHead
from autodeco_fast.training.scan_store import ScanTokens


@torch.inference_mode()
def predict(head: TemperatureHead, tokens: ScanTokens, chunk: int = 8192) -> np.ndarray:
    """T̂ of every token without the head's offset, fp32."""
    offset, head.offset = head.offset, 0.0
    try:
        predicted = [head(h.float()) for h in tokens.hidden.split(chunk)]
    finally:
        head.offset = offset
    return torch.cat(predicted).cpu().numpy()


def required_temperatures(tokens: ScanTokens, min_p: float) -> np.ndarray:
    """T* of every token."""
    return tokens.gap.numpy() / -math.log(min_p)
