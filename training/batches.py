"""Where a training step's tokens come from: the base model running over rows of text, or a scan of
it.

A source says how many steps an epoch has and yields a step's micro-batches. Their order and their
uniform numbers depend on seed, epoch and the token alone, not on the number of processes or what
came before.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.config import TrainConfig
from autodeco_fast.training.data import IGNORED, Row
from autodeco_fast.training.objectives import Batch
from autodeco_fast.training.scan import SCAN_EPOCH, lm_head_fingerprint, pad, uniform_of_scan
from autodeco_fast.training.scan_store import Scan, ScanTokens, read_fields, read_shard
from autodeco_fast.training.token_noise import uniform

# A group is held as it is read, joined, put in order and taken by a step, and the allocator keeps
# some of what was freed.
# With 5, memory grows by less than the limit in bench/scan.py (its rows with max_memory, less the
# one of 1 MB).
_COPIES = 5
_HELD_OUT_EPOCH = SCAN_EPOCH - 1


class Source(Protocol):
    """See the top of the file."""

    hidden_size: int
    device: torch.device
    lm_head: BaseModel | None  # None: batches bring their statistics

    def identity(self) -> dict[str, str]:
        """Fingerprints of lm_head and tokenizer, and of the data as trained_on, as far as they are
        known."""
        ...

    def steps_per_epoch(self, world: int) -> int: ...

    def batches(self, epoch: int, step: int, rank: int, world: int) -> Iterator[Batch]:
        """The micro-batches that process `rank` of `world` runs in a step; none if nothing is left
        for it."""
        ...


def held_out(documents: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """Which documents are measured on instead of learned from. bool `[N]`"""
    return uniform(seed, _HELD_OUT_EPOCH, documents, torch.zeros_like(documents)) < fraction


def _order(n: int, seed: int, epoch: int) -> torch.Tensor:
    key = (seed * 1_000_003 + epoch + 2**63) % 2**64 - 2**63
    return torch.randperm(n, generator=torch.Generator().manual_seed(key))


def _check_split(learned: int, measured: int, fraction: float) -> None:
    """Refuses documents that all ended on one side.

    Raises:
        ValueError: naming the setting.
    """
    if fraction and not (learned and measured):
        what = "none" if learned else "all"
        raise ValueError(
            f"eval_fraction {fraction:g} holds out {what} of the data's documents: change it, or "
            "the seed"
        )


class OnlineSource:
    """Rows of text through the base model; nothing is kept."""

    def __init__(
        self,
        base: BaseModel,
        rows: list[Row],
        config: TrainConfig,
        documents: list[int] | None = None,
    ):
        self.base, self.rows, self.config = base, rows, config
        self.lm_head = base
        self.documents = list(range(len(rows))) if documents is None else documents
        self.hidden_size, self.device = base.weight.shape[1], base.weight.device

    def split(self) -> "tuple[OnlineSource, OnlineSource | None]":
        """What to learn from, and what to measure on, if anything."""
        out = held_out(
            torch.tensor(self.documents), self.config.eval_fraction, self.config.seed
        ).tolist()
        _check_split(len(out) - sum(out), sum(out), self.config.eval_fraction)
        return self._where(out, False), self._where(out, True) if any(out) else None

    def _where(self, held: list[bool], wanted: bool) -> "OnlineSource":
        rows = [row for row, is_held in zip(self.rows, held) if is_held == wanted]
        documents = [d for d, is_held in zip(self.documents, held) if is_held == wanted]
        return OnlineSource(self.base, rows, self.config, documents)

    def identity(self) -> dict[str, str]:
        return {"lm_head": lm_head_fingerprint(self.base)}

    def steps_per_epoch(self, world: int) -> int:
        return -(-len(self.rows) // self._width(world))

    def _width(self, world: int) -> int:
        return (
            self.config.per_device_train_batch_size
            * self.config.gradient_accumulation_steps
            * world
        )

    def batches(self, epoch: int, step: int, rank: int, world: int) -> Iterator[Batch]:
        width, size = self._width(world), self.config.per_device_train_batch_size
        order = _order(len(self.rows), self.config.seed, epoch).tolist()
        mine = order[step * width : (step + 1) * width][rank::world]
        for at in range(0, len(mine), size):
            yield self._batch(mine[at : at + size], epoch)

    def _batch(self, numbers: list[int], epoch: int) -> Batch:
        ids, mask, labels = (t.to(self.device) for t in pad([self.rows[i] for i in numbers]))
        wanted = labels[:, 1:] != IGNORED
        hidden = self.base.hidden(ids, mask)[:, :-1][wanted].to(self.base.weight.dtype)  # [N, H]
        document = torch.tensor([self.documents[i] for i in numbers], device=self.device)
        document = document[:, None].expand(wanted.shape)[wanted]
        position = torch.arange(1, ids.shape[1], device=self.device).expand(wanted.shape)[wanted]
        selects = uniform(self.config.seed, epoch, document, position)
        return Batch(hidden, labels[:, 1:][wanted], selects)


class Slice(NamedTuple):
    """Neighbouring tokens of a shard."""

    path: Path
    rows: slice
    size: int  # tokens that are wanted


class ScanSource:
    """A scan's tokens, shuffled. Where they are more than `max_memory` holds, slices of shards are
    shuffled, and tokens within as many slices as fit.
    """

    def __init__(
        self, scan: Scan, config: TrainConfig, device: torch.device, measure: bool = False
    ):
        self.scan, self.config, self.device, self.measure = scan, config, device, measure
        self.hidden_size, self.lm_head = scan.hidden_size, None
        self.share, self.seed = scan.manifest["share"], scan.manifest["settings"]["seed"]
        token_bytes = 2 * self.hidden_size + 28
        self.limit = (
            max(1, config.max_memory // (_COPIES * token_bytes)) if config.max_memory else len(scan)
        )
        self.slices = [one for path, n in zip(scan.paths, scan.sizes) for one in self._cut(path, n)]
        self._held: tuple[tuple[int, int], ScanTokens] | None = None

    def _cut(self, path: Path, n: int) -> Iterator[Slice]:
        """A shard in slices of which several fit into memory."""
        size = n if n <= self.limit else max(1, self.limit // 4)
        wanted = (
            self._wanted(*read_fields(path, ("document",))) if self.config.eval_fraction else None
        )
        for at in range(0, n, size):
            rows = slice(at, min(at + size, n))
            yield Slice(path, rows, rows.stop - at if wanted is None else int(wanted[rows].sum()))

    def _wanted(self, document: torch.Tensor) -> torch.Tensor:
        return held_out(document, self.config.eval_fraction, self.config.seed) == self.measure

    def __len__(self) -> int:
        return sum(one.size for one in self.slices)

    def split(self) -> "tuple[ScanSource, ScanSource | None]":
        """What to learn from, and what to measure on, if anything."""
        if not self.config.eval_fraction:
            return self, None
        other = ScanSource(self.scan, self.config, self.device, measure=True)
        _check_split(len(self), len(other), self.config.eval_fraction)
        return self, other

    def identity(self) -> dict[str, str]:
        found = self.scan.manifest
        return {
            "lm_head": found["lm_head"],
            "tokenizer": found["tokenizer"],
            "trained_on": found["data"],
        }

    def steps_per_epoch(self, world: int) -> int:
        return -(-len(self) // (self.config.batch_tokens * world))

    @functools.lru_cache(maxsize=2)  # noqa: B019 -- a source lives as long as its run
    def _groups(self, epoch: int) -> list[tuple[int, list[Slice], int]]:
        """(number, slices, tokens) of the groups of an epoch, in order."""
        groups, group, size = [], [], 0
        for index in _order(len(self.slices), self.config.seed, epoch).tolist():
            one = self.slices[index]
            if group and size + one.size > self.limit:
                groups.append((len(groups), group, size))
                group, size = [], 0
            group.append(one)
            size += one.size
        return [*groups, (len(groups), group, size)]

    def _group(self, epoch: int, number: int, slices: list[Slice]) -> ScanTokens:
        if self._held is None or self._held[0] != (epoch, number):
            self._held = None  # freed before the next is read
            tokens = []
            for one in slices:
                read = read_shard(one.path, one.rows)
                tokens.append(
                    read.rows(self._wanted(read.document)) if self.config.eval_fraction else read
                )
            whole = ScanTokens.cat(tokens) if len(tokens) > 1 else tokens[0]
            del tokens
            order = _order(len(whole), self.config.seed, epoch * 1_000_003 + number)
            self._held = (epoch, number), whole.rows(order)
        return self._held[1]

    def batches(self, epoch: int, step: int, rank: int, world: int) -> Iterator[Batch]:
        width = self.config.batch_tokens * world
        start, end = step * width, min((step + 1) * width, len(self))
        share = -(-(end - start) // world)
        start, end = start + rank * share, min(start + (rank + 1) * share, end)
        begin = 0
        for number, slices, size in self._groups(epoch):
            low, high = max(start, begin), min(end, begin + size)
            if low < high:
                tokens = self._group(epoch, number, slices).rows(slice(low - begin, high - begin))
                yield self._batch(tokens)
            begin += size

    def _batch(self, tokens: ScanTokens) -> Batch:
        fields = (getattr(tokens, name).to(self.device) for name in ScanTokens.__dataclass_fields__)
        tokens = ScanTokens(*fields)
        # Divided by the share that the scan kept: what it kept stays kept.
        selects = uniform_of_scan(tokens.document, tokens.position, self.seed) / self.share
        return Batch(tokens.hidden, tokens.target.long(), selects, tokens.stats())
