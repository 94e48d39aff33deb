"""Checkpoints of a training run: folders `checkpoint-<step>` that are whole or not there, and hold
all that a resume needs.

    head.safetensors, optimizer.safetensors    parameters, and AdamW's moments by parameter name
    best.safetensors                           of early stopping, if it has a best head
    state.json                                 step, and what early stopping knows

Order, draws and the learning rate are functions of seed and step, so no generator's state has to be
kept.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from autodeco_fast.checkpoint import check_finite
from autodeco_fast.errors import line, read_json_object
from autodeco_fast.files import atomic_write, write_text
from autodeco_fast.values import require, whole

HEAD, OPTIMIZER, BEST, STATE = (
    "head.safetensors",
    "optimizer.safetensors",
    "best.safetensors",
    "state.json",
)


@dataclass
class Progress:
    """Where a run is."""

    step: int = 0
    kept_tokens: int = 0
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
    draft = output / f".checkpoint-{progress.step}.{os.getpid()}.tmp"
    draft.mkdir(parents=True)
    try:
        tensors = {
            HEAD: tensors_of(head),
            OPTIMIZER: _moments(head, optimizer),
            **({} if best is None else {BEST: best}),
        }
        for name, part in tensors.items():
            atomic_write(draft / name, lambda path, part=part: save_file(part, path))
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
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        ValueError,
    ) as error:  # RuntimeError: tensors of another head
        raise ValueError(f"{folder} is not a checkpoint of this head: {line(error)}") from None


def _progress(state: dict) -> Progress:
    names = [field.name for field in fields(Progress)]
    if sorted(state) != sorted(names):
        raise ValueError(f"{STATE} must have the keys {sorted(names)}, got {sorted(state)}")
    best = state["best_loss"]
    require(
        isinstance(best, float), "best_loss", best, "a number"
    )  # infinite before the first measurement
    return Progress(
        **{n: best if n == "best_loss" else whole(n, state[n], 0, 2**63 - 1) for n in names}
    )
