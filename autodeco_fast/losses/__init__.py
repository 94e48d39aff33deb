"""What heads learn from: the Min-P hinge, with labels and without, which tokens to learn from, and
AutoDeco's losses, and rewards."""

from autodeco_fast.losses.autodeco import autodeco_temperature_loss, soft_top_p_loss
from autodeco_fast.losses.hinge import (
    min_p_hinge_loss,
    required_temperature,
)
from autodeco_fast.losses.nucleus import linear_nucleus_width_loss, nucleus_width_loss
from autodeco_fast.losses.rewards import reward_loss
from autodeco_fast.losses.selection import (
    IMPOSSIBLE,
    MIDDLE,
    TRIVIAL,
    difficulty,
    goldilocks_mask,
    goldilocks_weight,
)

__all__ = [
    "IMPOSSIBLE",
    "MIDDLE",
    "TRIVIAL",
    "autodeco_temperature_loss",
    "difficulty",
    "goldilocks_mask",
    "goldilocks_weight",
    "linear_nucleus_width_loss",
    "min_p_hinge_loss",
    "nucleus_width_loss",
    "required_temperature",
    "reward_loss",
    "soft_top_p_loss",
]
