"""The temperature head and AutoDeco's top-p head as modules."""

import os
from abc import ABC, abstractmethod

import torch
from torch import nn

from autodeco_fast.checkpoint import (
    fetch,
    load_tensors,
    read_config,
    read_shapes,
    save_head,
    training_settings,
)
from autodeco_fast.ops.prob_stats import ProbStats, prob_stats
from autodeco_fast.ops.temperature_head import temperature_head
from autodeco_fast.values import finite, inner_share, require, whole

DEFAULT_MIN_P = 0.1  # where a head does not know what it was made for
_WIDEST = 2**24  # so that no product of two sizes overflows


def _sizes(hidden_size: object, intermediate_size: object) -> dict[str, int]:
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    return {name: whole(name, value, 1, _WIDEST) for name, value in sizes.items()}


class _Saved(nn.Module, ABC):
    """An MLP of two layers with settings, saved as a folder with its configuration and weights."""

    config_keys: tuple[str, ...]
    # Of configurations written before they existed: training wrote them beside the head.
    optional_keys: tuple[str, ...] = ()

    @staticmethod
    @abstractmethod
    def _checked(**settings) -> dict:
        """The settings as they are stored. Raises ValueError for those that are no head's."""

    @staticmethod
    @abstractmethod
    def _input_width(settings: dict) -> int:
        """Columns of W1."""

    def _build(self, **settings) -> None:
        """Takes the settings and makes the layers."""
        settings = self._checked(**settings)
        for name, value in settings.items():
            setattr(self, name, value)
        F = self.intermediate_size
        self.mlp = nn.Sequential(
            nn.Linear(self._input_width(settings), F), nn.ReLU(), nn.Linear(F, 1)
        )

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes `autodeco_config.json` and `head.safetensors`, each whole or not at all.

        Raises:
            ValueError: for weights or settings that `from_pretrained` would refuse, NaN above all;
                nothing is written.
        """
        settings = self._checked(**{key: getattr(self, key) for key in self.config_keys})
        save_head(folder, settings, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "_Saved":
        """Reads a folder, or an id on the Hugging Face hub.

        Memory is taken for weights that are in the file, not for what the configuration says.

        Raises:
            ValueError: if it holds no such head, weights that do not fit its configuration, or NaN.
        """
        folder = fetch(os.fspath(folder))
        config, got = read_config(folder), read_shapes(folder)
        keys, optional = set(cls.config_keys), set(cls.optional_keys)
        if not keys - optional <= set(config) <= keys:
            raise ValueError(
                f"head configuration must have the keys {sorted(keys)}, got {sorted(config)}"
            )
        lacking = [key for key in optional if config.get(key) is None]
        beside = training_settings(folder) if lacking else {}
        settings = cls._checked(**{**config, **{key: beside.get(key) for key in lacking}})
        W, F = cls._input_width(settings), settings["intermediate_size"]
        expected = {"mlp.0.bias": (F,), "mlp.0.weight": (F, W)}
        expected |= {"mlp.2.bias": (1,), "mlp.2.weight": (1, F)}
        if expected != got:
            raise ValueError(f"head weights must be {expected}, got {got}")
        head = cls(**settings)
        head.load_state_dict(load_tensors(folder))
        return head


class TemperatureHead(_Saved):
    """`T = max_temperature · sigmoid(w2 · relu(W1 h + b1) + b2)`.

    Parameters are named as AutoDeco's (`mlp.0`, `mlp.2`). The last layer starts at zero, so T
    starts at `max_temperature / 2` everywhere.

    Args:
        hidden_size: width H of what enters the output embedding.
        intermediate_size: width F of the hidden layer.
        max_temperature: upper end of T.
        offset: added to T, the result clipped to [0, max_temperature] (conformal calibration); 0
            adds nothing.
        min_p: the Min-P cut, in (0, 1), that the head was trained or calibrated for: what `attach`
            and the commands take unless they are told another. None if it is not known; they take
            0.1 then.

    Raises:
        ValueError: for a value of another type or out of range.
    """

    config_keys = ("hidden_size", "intermediate_size", "max_temperature", "offset", "min_p")
    optional_keys = ("min_p",)

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int = 256,
        max_temperature: float = 2.0,
        offset: float = 0.0,
        min_p: float | None = None,
    ):
        super().__init__()
        self._build(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            max_temperature=max_temperature,
            offset=offset,
            min_p=min_p,
        )
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    @staticmethod
    def _checked(*, hidden_size, intermediate_size, max_temperature, offset, min_p) -> dict:
        limit = finite("max_temperature", max_temperature)
        require(limit > 0, "max_temperature", max_temperature, "positive")
        return {
            **_sizes(hidden_size, intermediate_size),
            "max_temperature": limit,
            "offset": finite("offset", offset),
            "min_p": None if min_p is None else inner_share("min_p", min_p),
        }

    @staticmethod
    def _input_width(settings: dict) -> int:
        return settings["hidden_size"]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., H]` bf16, fp16 or fp32 → `[...]` fp32."""
        first, _, last = self.mlp
        T = temperature_head(
            hidden,
            first.weight,
            first.bias,
            last.weight,
            last.bias,
            max_temperature=self.max_temperature,
        )
        return (T + self.offset).clamp(0.0, self.max_temperature) if self.offset else T

    def extra_repr(self) -> str:
        cut = "" if self.min_p is None else f", min_p={self.min_p:g}"
        return f"max_temperature={self.max_temperature:g}, offset={self.offset:g}{cut}"


class TopPHead(_Saved):
    """AutoDeco's second head, `P = sigmoid(w2 · relu(W1 [h, T, features] + b1) + b2)`.

    Parameters have AutoDeco's names and shapes.

    Args:
        hidden_size: width H of what enters the output embedding.
        use_enhanced_features: whether W1 is `[F, H + 5]`, for T and the four numbers of
            `prob_stats`, or `[F, H + 1]`.
        intermediate_size: width F of the hidden layer.
    """

    config_keys = ("hidden_size", "use_enhanced_features", "intermediate_size")

    def __init__(
        self, hidden_size: int, use_enhanced_features: bool = True, intermediate_size: int = 256
    ):
        super().__init__()
        self._build(
            hidden_size=hidden_size,
            use_enhanced_features=use_enhanced_features,
            intermediate_size=intermediate_size,
        )

    @staticmethod
    def _checked(*, hidden_size, use_enhanced_features, intermediate_size) -> dict:
        is_bool = isinstance(use_enhanced_features, bool)
        require(is_bool, "use_enhanced_features", use_enhanced_features, "True or False")
        return {
            **_sizes(hidden_size, intermediate_size),
            "use_enhanced_features": use_enhanced_features,
        }

    @staticmethod
    def _input_width(settings: dict) -> int:
        return settings["hidden_size"] + (5 if settings["use_enhanced_features"] else 1)

    def features(
        self, logits: torch.Tensor, temperature: torch.Tensor, **transform: float | None
    ) -> ProbStats | None:
        """What the head reads of logits `[..., V]` at a temperature `[...]`, each `[...]` on the
        head's device and without a gradient; None if it reads nothing of them.

        Args:
            transform: `logit_scale` and `softcap` of the logits, as `prob_stats` takes them.
        """
        if not self.use_enhanced_features:
            return None
        T = temperature.detach().to(logits.device)
        flat = prob_stats(logits.flatten(0, -2), T.flatten(), **transform)
        return ProbStats(*(each.view(T.shape).to(self.mlp[0].weight.device) for each in flat))

    def forward(
        self, hidden: torch.Tensor, temperature: torch.Tensor, features: ProbStats | None = None
    ) -> torch.Tensor:
        """Top-p, `[...]` in (0, 1) and in the dtype of the weights.

        Args:
            hidden: `[..., H]`.
            temperature: `[...]`.
            features: `prob_stats` at that temperature, each `[...]`; needed with
                `use_enhanced_features`, else not taken.

        Raises:
            ValueError: for another width, or features that are missing or not taken.
        """
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden has width {hidden.shape[-1]}, the head was made for {self.hidden_size}"
            )
        if (features is None) == self.use_enhanced_features:
            expected, came = ("prob_stats", "none") if features is None else ("None", "some")
            raise ValueError(
                f"features must be {expected} with "
                f"use_enhanced_features={self.use_enhanced_features}, got {came}"
            )
        dtype = self.mlp[0].weight.dtype
        columns = torch.stack([temperature, *(features or ())], -1)
        inputs = torch.cat([hidden.to(dtype), columns.to(dtype)], -1)
        return self.mlp(inputs).squeeze(-1).sigmoid()
