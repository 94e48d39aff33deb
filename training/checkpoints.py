"""Checkpoints of a training run: folders that are whole or not there, with all a resume needs.

    checkpoint-<step>/head.safetensors         parameters
    checkpoint-<step>/optimizer.safetensors    AdamW's moments by parameter name
    checkpoint-<step>/state.json               step, and what early stopping knows
    checkpoint-<step>/best.safetensors         the best head, if early stopping has one

Order, uniforms and the learning rate are functions of seed and step, so no generator's state has to
be written.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autodeco_fast.checkpoint import check_finite
from autodeco_fast.errors import line, read_json_object
from autodeco_fast.files import atomic_write, write_text
from autodeco_fast.values import require, whole

HEAD, OPTIMIZER = "head.safetensors", "optimizer.safetensors"
BEST, STATE = "best.safetensors", "state.json"


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    selected_tokens: int = 0
    best_loss: float = float("inf")
    without_better: int = 0


def _numbered(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = [
        p for p in output.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def newest(output: Path) -> Path | None:
    return next(reversed(_numbered(output)), None)


def _moments(head: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu().contiguous().clone()
        for name, parameter in head.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def tensors_of(head: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().contiguous().clone() for name, t in head.state_dict().items()}


def save(
    output: Path,
    *,
    head: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: dict[str, torch.Tensor] | None,
    limit: int,
) -> None:
    """Writes a checkpoint and removes the oldest beyond `limit`.

    Raises:
        ValueError: for weights that are not finite; nothing is written.
    """
    check_finite(tensors_of(head), f"the weights at step {progress.step}")
    target = output / f"checkpoint-{progress.step}"
    for left in output.glob(".checkpoint-*.tmp"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    draft = output / f".checkpoint-{progress.step}.tmp"
    draft.mkdir(parents=True)
    try:
        tensors = {
            HEAD: tensors_of(head),
            OPTIMIZER: _moments(head, optimizer),
            **({} if best is None else {BEST: best}),
        }
        for name, content in tensors.items():
            atomic_write(draft / name, partial(save_file, content))
        write_text(draft / STATE, json.dumps(asdict(progress)))
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in _numbered(output)[:-limit]:
        shutil.rmtree(old)


def load(
    folder: Path, head: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, torch.Tensor] | None]:
    """Puts a checkpoint into head and optimizer; returns where the run was, and its best head.

    Raises:
        ValueError: naming the folder, if it is no checkpoint of this head.
    """
    try:
        head.load_state_dict(load_file(folder / HEAD))
        moments = load_file(folder / OPTIMIZER)
        for name, parameter in head.named_parameters():
            keys = [key for key in moments if key.rpartition(".")[0] == name]
            state = {key.rpartition(".")[2]: moments[key] for key in keys}
            optimizer.state[parameter] = {
                k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
            }
        best = load_file(folder / BEST) if (folder / BEST).exists() else None
        return _progress(read_json_object(folder / STATE)), best
    # RuntimeError: tensors of another head
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} is not a checkpoint of this head: {line(error)}") from None


def _progress(state: dict) -> Progress:
    names = [field.name for field in fields(Progress)]
    if sorted(state) != sorted(names):
        raise ValueError(f"{STATE} must have the keys {sorted(names)}, got {sorted(state)}")
    best = state["best_loss"]
    require(isinstance(best, float), "best_loss", best, "a number")  # infinite before the first
    counts = {n: whole(n, state[n], 0, 2**63 - 1) for n in names if n != "best_loss"}
    return Progress(**counts, best_loss=best)
