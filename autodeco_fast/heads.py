"""The temperature head and AutoDeco's top-p head as modules."""

import os

import torch
from torch import nn

from autodeco_fast.checkpoint import load_head, save_head
from autodeco_fast.ops.prob_stats import ProbStats
from autodeco_fast.ops.temperature_head import temperature_head


class _Saved(nn.Module):
    """Saving and loading of a head: a folder with its configuration and its weights."""

    config_keys: tuple[str, ...]

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `autodeco_config.json` and `head.safetensors`, each whole or not at all."""
        save_head(folder, {key: getattr(self, key) for key in self.config_keys}, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "_Saved":
        """Reads a folder, or an id on the Hugging Face hub.

        Raises:
            ValueError: if it holds no such head, or weights that do not fit its configuration.
        """
        config, tensors = load_head(folder)
        if set(config) != set(cls.config_keys):
            raise ValueError(f"head configuration must have the keys {sorted(cls.config_keys)}, got {sorted(config)}")
        head = cls(**config)
        want = {name: tuple(t.shape) for name, t in head.state_dict().items()}
        got = {name: tuple(t.shape) for name, t in tensors.items()}
        if want != got:
            raise ValueError(f"head weights must be {want}, got {got}")
        head.load_state_dict(tensors)
        return head


class TemperatureHead(_Saved):
    """`T = max_temperature · sigmoid(w2 · relu(W1 h + b1) + b2)`, with AutoDeco's parameter names (`mlp.0`, `mlp.2`).

    The last layer starts at zero, so T starts at `max_temperature / 2` everywhere.

    Args:
        hidden_size: width H of what enters the output embedding.
        intermediate_size: width F of the hidden layer.
        max_temperature: upper end of T.
        offset: added to T, the result clipped to [0, max_temperature] (conformal calibration); 0 adds nothing.
    """

    config_keys = ("hidden_size", "intermediate_size", "max_temperature", "offset")

    def __init__(self, hidden_size: int, intermediate_size: int = 256, max_temperature: float = 2.0, offset: float = 0.0):
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if max_temperature <= 0:
            raise ValueError(f"max_temperature must be positive, got {max_temperature}")
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.max_temperature, self.offset = float(max_temperature), float(offset)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, intermediate_size), nn.ReLU(), nn.Linear(intermediate_size, 1))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., H]` bf16, fp16 or fp32 → `[...]` fp32."""
        first, _, last = self.mlp
        T = temperature_head(hidden, first.weight, first.bias, last.weight, last.bias, max_temperature=self.max_temperature)
        return (T + self.offset).clamp(0.0, self.max_temperature) if self.offset else T

    def extra_repr(self) -> str:
        return f"max_temperature={self.max_temperature:g}, offset={self.offset:g}"


class TopPHead(_Saved):
    """AutoDeco's second head, `P = sigmoid(w2 · relu(W1 [h, T, features] + b1) + b2)`, with its parameter names and shapes.

    Args:
        hidden_size: width H of what enters the output embedding.
        use_enhanced_features: whether W1 is `[F, H + 5]`, for T and the four numbers of `prob_stats`, or `[F, H + 1]`.
        intermediate_size: width F of the hidden layer.
    """

    config_keys = ("hidden_size", "use_enhanced_features", "intermediate_size")

    def __init__(self, hidden_size: int, use_enhanced_features: bool = True, intermediate_size: int = 256):
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.use_enhanced_features = use_enhanced_features
        width = hidden_size + (5 if use_enhanced_features else 1)
        self.mlp = nn.Sequential(nn.Linear(width, intermediate_size), nn.ReLU(), nn.Linear(intermediate_size, 1))

    def forward(self, hidden: torch.Tensor, temperature: torch.Tensor, features: ProbStats | None = None) -> torch.Tensor:
        """Top-p, `[...]` in (0, 1) and in the dtype of the weights.

        Args:
            hidden: `[..., H]`.
            temperature: `[...]`.
            features: `prob_stats` at that temperature, each `[...]`; needed with `use_enhanced_features`, else not taken.

        Raises:
            ValueError: for another width, or features that are missing or not taken.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden has width {hidden.shape[-1]}, the head was made for {self.hidden_size}")
        if (features is None) == self.use_enhanced_features:
            wanted, came = ("prob_stats", "none") if features is None else ("None", "some")
            raise ValueError(f"features must be {wanted} with use_enhanced_features={self.use_enhanced_features}, got {came}")
        kind = self.mlp[0].weight.dtype
        columns = torch.stack([temperature, *(features or ())], -1)
        return torch.sigmoid(self.mlp(torch.cat([hidden.to(kind), columns.to(kind)], -1)).squeeze(-1))
