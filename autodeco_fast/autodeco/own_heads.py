"""Heads between the released format and this library's folders.

The format has no place for what our heads know besides: a conformal offset, another upper end of T
or another width of the hidden layer change what is predicted and are refused; the Min-P that a head
was made for is left out with a warning.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from autodeco_fast.autodeco.layout import (
    INTERMEDIATE_SIZE,
    MAX_TEMPERATURE,
    TEMP_PREFIX,
    TOP_P_PREFIX,
    used_heads,
)
from autodeco_fast.checkpoint import CONFIG_NAME, SETTINGS_NAME, WEIGHTS_NAME
from autodeco_fast.heads import TemperatureHead, TopPHead
from autodeco_fast.values import require

TOP_P_FOLDER = "top_p_head"  # within the temperature head's, as training leaves it
OWN_FILES = tuple(
    f"{within}{name}"
    for within in ("", f"{TOP_P_FOLDER}/")
    for name in (CONFIG_NAME, WEIGHTS_NAME, SETTINGS_NAME)
)


@dataclass(frozen=True)
class Heads:
    """Those that are used; None for one that is not."""

    temperature: TemperatureHead | None
    top_p: TopPHead | None

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the format's names, in the weights' dtype."""
        heads = {TEMP_PREFIX: self.temperature, TOP_P_PREFIX: self.top_p}
        return {
            prefix + name: tensor
            for prefix, head in heads.items()
            if head is not None
            for name, tensor in head.state_dict().items()
        }

    def check(self, width: int, *, head: str = "temp_head", top_p_head: str = "top_p_head") -> None:
        """That the format can express them, for a base whose output embedding takes this width.

        A Min-P that the temperature head was made for is warned of: it is left out.

        Args:
            head, top_p_head: what complaints call them.

        Raises:
            ValueError: for no head, another module than a head, one of another width, or one that
                the format cannot express.
        """
        if self.temperature is None and self.top_p is None:
            raise ValueError(f"{head} and {top_p_head} must not both be None")
        named = (head, self.temperature, TemperatureHead), (top_p_head, self.top_p, TopPHead)
        for name, each, kind in named:
            if each is None:
                continue
            came = type(each).__name__
            require(isinstance(each, kind), name, came, f"a {kind.__name__}")
            if each.hidden_size != width:
                raise ValueError(f"{name} has width {each.hidden_size}, the base {width}")
            _check(f"{name}: intermediate_size", each.intermediate_size, INTERMEDIATE_SIZE)
        if self.temperature is None:
            return
        _check(f"{head}: max_temperature", self.temperature.max_temperature, MAX_TEMPERATURE)
        _check(f"{head}: offset (of calibration)", self.temperature.offset, 0.0)
        if (min_p := self.temperature.min_p) is not None:
            warnings.warn(
                f"AutoDeco checkpoints know no Min-P: give min_p={min_p:g}, which {head} was made "
                "for, wherever it is used",
                stacklevel=4,
            )

    def flags(self) -> dict[str, bool]:
        """What a checkpoint's configuration says of them, as arguments of `layout.flatten`."""
        return {
            "enable_temperature_head": self.temperature is not None,
            "enable_top_p_head": self.top_p is not None,
            "use_enhanced_features": self.top_p is None or self.top_p.use_enhanced_features,
        }

    def save(self, folder: Path) -> None:
        """As this library's folders: the temperature head, the top-p head in one within it."""
        if self.temperature is not None:
            self.temperature.save_pretrained(folder)
        if self.top_p is not None:
            self.top_p.save_pretrained(folder / TOP_P_FOLDER)


def own_heads(folder: Path) -> Heads | None:
    """Those in a folder of this library's: a temperature head, a top-p head in one within it, or
    either alone; None if there are none.

    Raises:
        ValueError: for a head that is broken.
    """
    has = holds_own(folder)
    if not any(has):
        return None
    return Heads(
        TemperatureHead.from_pretrained(folder) if has[0] else None,
        TopPHead.from_pretrained(folder / TOP_P_FOLDER) if has[1] else None,
    )


def holds_own(folder: Path) -> tuple[bool, bool]:
    """Whether a folder holds a temperature head of this library's, and a top-p head within."""
    return (folder / CONFIG_NAME).is_file(), (folder / TOP_P_FOLDER).is_dir()


def read_heads(head: str | None, top_p_head: str | None, *, width: int) -> Heads:
    """Heads in this library's folders, which may go into a checkpoint.

    Raises:
        ValueError: for one of another width, or that the format cannot express.
    """
    temperature = None if head is None else TemperatureHead.from_pretrained(head)
    top_p = None if top_p_head is None else TopPHead.from_pretrained(top_p_head)
    heads = Heads(temperature, top_p)
    heads.check(width, head=f"head {head!r}", top_p_head=f"top_p_head {top_p_head!r}")
    return heads


def new_heads(width: int, seed: int) -> Heads:
    """Both heads as they are before training: T is 1 everywhere.

    Raises:
        ValueError: for a width that is none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Heads(TemperatureHead(width), TopPHead(width))


def heads_of(config: Mapping, tensors: Mapping[str, torch.Tensor]) -> Heads:
    """The heads that a checkpoint uses, in fp32.

    Args:
        config: one that went through `layout.check_config`.
        tensors: that went through `layout.check_heads`.

    Raises:
        ValueError: if it uses none.
    """
    used = used_heads(config)
    require(bool(used), "enable_temperature_head, enable_top_p_head", used, "true, one of them")
    temperature = top_p = None
    if TEMP_PREFIX in used:
        temperature = TemperatureHead(config["temperature_hidden_size"])
        _fill(temperature, TEMP_PREFIX, tensors)
    if TOP_P_PREFIX in used:
        top_p = TopPHead(config["top_p_hidden_size"], config["use_enhanced_features"])
        _fill(top_p, TOP_P_PREFIX, tensors)
    return Heads(temperature, top_p)


def _fill(head: torch.nn.Module, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
    head.load_state_dict(
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    )


def _check(name: str, value: float, only: float) -> None:
    require(value == only, name, value, f"{only:g}, all that AutoDeco checkpoints can express")
