"""The thin training loop: a frozen base, token statistics, the hinge, AdamW on the head.

Every process takes its share of a step's rows and adds up gradients of *summed* losses; they are summed over the
processes and divided by the step's kept tokens once. So neither accumulation nor the number of processes changes what is
computed, and rows with many targets weigh by their tokens.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch

from autodeco_fast import TemperatureHead, goldilocks_mask, min_p_hinge_loss, required_temperature
from autodeco_fast.checkpoint import CONFIG_NAME, write_text
from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.config import TrainConfig
from autodeco_fast.training.rows import IGNORED, Row

METRICS_NAME, SETTINGS_NAME = "metrics.jsonl", "training.json"


def pad(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels `[B, L]` of rows padded on the right."""
    length = max(len(row.input_ids) for row in rows)
    fill = lambda values, value: values + [value] * (length - len(values))  # noqa: E731
    return (
        torch.tensor([fill(row.input_ids, 0) for row in rows]),
        torch.tensor([fill([1] * len(row.input_ids), 0) for row in rows]),
        torch.tensor([fill(row.labels, IGNORED) for row in rows]),
    )


def share_of_step(order: list[int], step: int, config: TrainConfig, rank: int, world: int) -> Iterator[list[int]]:
    """The batches of row numbers that process `rank` of `world` runs in a step; none if it has no rows left."""
    size = config.per_device_train_batch_size
    width = size * config.gradient_accumulation_steps * world
    mine = order[step * width : (step + 1) * width][rank::world]
    for at in range(0, len(mine), size):
        yield mine[at : at + size]


@dataclass
class Totals:
    """Sums over a step's tokens, `[6]`: kept, targets, loss, T, T*, covered; each is one token's unless said otherwise."""

    values: torch.Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.float64))

    def add(self, kept: torch.Tensor, loss: torch.Tensor, T: torch.Tensor, need: torch.Tensor) -> None:
        T = T.detach()
        inside = lambda x: torch.where(kept, x, 0.0).sum()  # noqa: E731
        sums = [kept.sum(), kept.new_tensor(len(kept), dtype=torch.long), loss.detach(), inside(T), inside(need)]
        self.values += torch.stack([s.double().cpu() for s in (*sums, (kept & (need <= T)).sum())])

    def means(self) -> dict[str, float]:
        kept, targets, *sums = self.values.tolist()
        names = ("loss", "temperature", "required_temperature", "coverage")
        return {**{n: s / max(kept, 1) for n, s in zip(names, sums)}, "kept_tokens": int(kept), "target_tokens": int(targets)}


def backward(
    base: BaseModel, head: TemperatureHead, rows: list[Row], config: TrainConfig, generator: torch.Generator, totals: Totals
) -> None:
    """Adds the gradient of the batch's summed loss to the head's parameters, and its sums to `totals`."""
    ids, mask, labels = (t.to(base.weight.device) for t in pad(rows))
    wanted = labels[:, 1:] != IGNORED
    hidden = base.hidden(ids, mask)[:, :-1][wanted]  # [N, H]
    with torch.no_grad():
        stats = base.stats(hidden, labels[:, 1:][wanted])
        selected = goldilocks_mask(
            stats,
            max_rank=config.max_rank,
            trivial_prob=config.trivial_prob,
            easy_fraction=config.easy_fraction,
            generator=generator,
        )
        need = required_temperature(stats, config.min_p)
    T = head(hidden)
    stats = stats._replace(rank=torch.where(selected, stats.rank, -1))
    options = {"min_p": config.min_p, "gravity": config.gravity, "max_temperature": head.max_temperature}
    loss = min_p_hinge_loss(T, stats, **options, reduction="sum")
    loss.backward()
    totals.add(selected & (need <= head.max_temperature), loss, T, need)


def learning_rate(step: int, steps: int, warmup_ratio: float) -> float:
    """Factor of the learning rate: a linear warm-up, then half a cosine to zero."""
    warmup = round(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * (step - warmup) / max(1, steps - warmup))))


def train(
    base: BaseModel,
    rows: list[Row],
    config: TrainConfig,
    *,
    accelerator=None,
    on_start: Callable[[int], None] = lambda steps: None,
    on_step: Callable[[dict], None] = lambda metrics: None,
) -> TemperatureHead:
    """Trains a head and writes it, its settings and its metrics to `config.output`.

    Args:
        rows: tokenised rows, the same in every process.
        accelerator: one of `accelerate`; made here if None.
        on_start: called with the number of optimizer steps.
        on_step: called with a step's metrics, in the main process.

    Raises:
        ValueError: if `config.output` holds a head already, or no step kept a token.
    """
    from accelerate import Accelerator

    mine = accelerator is None
    accelerator = Accelerator() if mine else accelerator
    if (config.output / CONFIG_NAME).exists():
        raise ValueError(f"output {str(config.output)!r} holds a head already; name another folder")
    torch.manual_seed(config.seed)
    head = TemperatureHead(base.weight.shape[1]).to(base.weight.device)
    rank, world = accelerator.process_index, accelerator.num_processes
    width = config.per_device_train_batch_size * config.gradient_accumulation_steps * world
    steps_per_epoch = -(-len(rows) // width)
    steps = steps_per_epoch * config.num_train_epochs
    steps = min(steps, config.max_steps or steps)
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, config.warmup_ratio))
    draws = torch.Generator(base.weight.device).manual_seed(config.seed * 1_000_003 + rank)
    shuffle = torch.Generator().manual_seed(config.seed)
    log = _Log(config) if accelerator.is_main_process else None
    on_start(steps)
    kept, started = 0, time.perf_counter()
    for step in range(steps):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(rows), generator=shuffle).tolist()
        totals = Totals()
        for numbers in share_of_step(order, step % steps_per_epoch, config, rank, world):
            backward(base, head, [rows[i] for i in numbers], config, draws, totals)
        totals.values = accelerator.reduce(totals.values.to(accelerator.device), "sum").cpu()
        metrics = totals.means()
        for p in head.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = accelerator.reduce(p.grad, "sum") / max(metrics["kept_tokens"], 1)
        metrics = {"step": step + 1, **metrics, "learning_rate": schedule.get_last_lr()[0]}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        kept += metrics["kept_tokens"]
        if log:
            metrics["seconds"] = time.perf_counter() - started
            log.write(metrics)
            on_step(metrics)
    if not kept:
        raise ValueError("no token was left to learn from: every target is trivial, impossible or out of reach")
    if log:
        head.save_pretrained(config.output)
    accelerator.wait_for_everyone()
    if mine:
        accelerator.end_training()  # several processes must close their group before they exit
    return head


class _Log:
    """`training.json`, and `metrics.jsonl` with one whole line a step."""

    def __init__(self, config: TrainConfig):
        self.path = config.output / METRICS_NAME
        settings = asdict(replace(config, data=str(config.data), output=str(config.output)))
        write_text(config.output / SETTINGS_NAME, json.dumps(settings, indent=1) + "\n")
        write_text(self.path, "")

    def write(self, metrics: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
