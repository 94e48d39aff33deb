"""Where a training step's tokens come from: the base model running over text, or a scan of it.

A source says how many steps an epoch has and yields a step's batches. Their order and their
uniforms depend on seed, epoch and the token alone, not on the number of processes or what came
before.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from autodeco_fast.training.base_model import BaseModel
from autodeco_fast.training.config import AUTODECO, TrainConfig
from autodeco_fast.training.data import IGNORED, Example
from autodeco_fast.training.objectives import Batch
from autodeco_fast.training.scan import model_identity, pad
from autodeco_fast.training.scan_store import (
    Scan,
    ScanTokens,
    file_fingerprint,
    fingerprint,
    read_fields,
    read_shard,
    token_bytes,
)
from autodeco_fast.training.token_uniform import held_out, mixed, scan_uniform, token_uniform
from autodeco_fast.training.wishes import gravities_of
from autodeco_fast.urls import Location, of_each

# A group is held as it is read, joined, put in order and taken by a step, and the allocator keeps
# some of what was freed. With 5, memory grows by less than the limit in bench/end_to_end/scan.py
# (its results with max_memory, less the one of 1 MB).
_COPIES = 5


class Source(Protocol):
    """See the top of the file."""

    hidden_size: int
    device: torch.device
    lm_head: BaseModel | None  # for objectives that look at logits

    def identity(self) -> dict[str, str]:
        """Fingerprints of lm_head, tokenizer and data (as trained_on), as far as they are known."""
        ...

    def steps_per_epoch(self, world: int) -> int: ...

    def batches(self, epoch: int, step: int, rank: int, world: int) -> Iterator[Batch]:
        """The batches that process `rank` of `world` runs in a step; none if nothing is left."""
        ...


def _order(n: int, *where: int) -> torch.Tensor:
    """A random order of n, another for every seed, epoch and whatever else."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed(*where)))


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
    """Examples through the base model; nothing is kept."""

    def __init__(
        self,
        base: BaseModel,
        examples: list[Example],
        config: TrainConfig,
        documents: list[int] | None = None,
    ):
        """
        Raises:
            ValueError: for a base model that processes share.
        """
        base.check_own()
        self.lm_head, self.examples, self.config = base, examples, config
        self.documents = list(range(len(examples))) if documents is None else documents
        self.hidden_size, self.device = base.weight.shape[1], base.weight.device

    def split(self) -> "tuple[OnlineSource, OnlineSource | None]":
        """What to learn from, and what to measure on, if anything."""
        documents, fraction = torch.tensor(self.documents), self.config.eval_fraction
        out = held_out(self.config.seed, documents, fraction).tolist()
        _check_split(len(out) - sum(out), sum(out), fraction)
        return self._subset(out, False), self._subset(out, True) if any(out) else None

    def _subset(self, out: list[bool], wanted: bool) -> "OnlineSource":
        index = [i for i, o in enumerate(out) if o == wanted]
        examples = [self.examples[i] for i in index]
        documents = [self.documents[i] for i in index]
        return OnlineSource(self.lm_head, examples, self.config, documents=documents)

    def identity(self) -> dict[str, str]:
        data = self.config.data
        of_data = {"trained_on": file_fingerprint(data)} if data.is_file() else {}
        return {
            **model_identity(self.lm_head),
            # A changed tokenizer or chat template shows in it.
            "encoded": fingerprint(*(repr(example).encode() for example in self.examples)),
            **of_data,
        }

    def steps_per_epoch(self, world: int) -> int:
        return -(-len(self.examples) // self._width(world))

    def _width(self, world: int) -> int:
        config = self.config
        return config.per_device_train_batch_size * config.gradient_accumulation_steps * world

    def batches(self, epoch: int, step: int, rank: int, world: int) -> Iterator[Batch]:
        width, size = self._width(world), self.config.per_device_train_batch_size
        order = _order(len(self.examples), self.config.seed, epoch).tolist()
        mine = order[step * width : (step + 1) * width][rank::world]
        for at in range(0, len(mine), size):
            yield self._batch(mine[at : at + size], epoch)

    def _batch(self, numbers: list[int], epoch: int) -> Batch:
        examples = [self.examples[i] for i in numbers]
        ids, mask, labels = (t.to(self.device) for t in pad(examples))
        wanted = labels[:, 1:] != IGNORED
        hidden = self.lm_head.hidden(ids, mask)[:, :-1][wanted].to(self.lm_head.weight.dtype)
        documents = torch.tensor([self.documents[i] for i in numbers], device=self.device)
        document = documents[:, None].expand(wanted.shape)[wanted]
        position = torch.arange(1, ids.shape[1], device=self.device).expand(wanted.shape)[wanted]
        uniform = token_uniform(self.config.seed, document, position, epoch=epoch)
        return Batch(hidden, labels[:, 1:][wanted], uniform)


class ShardSlice(NamedTuple):
    """Neighbouring tokens of a shard."""

    path: Location
    tokens: slice
    size: int  # tokens that are wanted


def check_selection(config: TrainConfig, scan: Scan) -> None:
    """Refuses a scan that left out tokens which the objective looks at, or wishes that it does not
    follow.

    Raises:
        ValueError: naming the objective.
    """
    selects_as_scans = config.objective == "autodeco_temperature" and config.goldilocks_filter
    looks_at_all = config.objective in AUTODECO and not selects_as_scans
    if looks_at_all and not scan.manifest["settings"]["all_tokens"]:
        raise ValueError(
            f"objective {config.objective} looks at every token, and scan {str(scan.folder)!r} "
            "left some out by difficulty: scan with --all-tokens"
        )
    if config.objective in AUTODECO and scan.variants > 1:
        raise ValueError(
            f"objective {config.objective} follows no wishes, and scan {str(scan.folder)!r} has "
            "them: scan without --wishes"
        )


class ScanSource:
    """A scan's tokens, shuffled; with the scanned model's LM head, if an objective needs it.

    Where they are more than `max_memory` holds, slices of shards are shuffled, and tokens within
    as many slices as fit: a group.

    Raises:
        ValueError: for a scan that the objective cannot learn from.
    """

    def __init__(
        self,
        scan: Scan,
        config: TrainConfig,
        device: torch.device,
        *,
        lm_head: BaseModel | None = None,
        measure: bool = False,
    ):
        check_selection(config, scan)
        self.scan, self.config, self.device, self.measure = scan, config, device, measure
        self.lm_head = lm_head
        self.hidden_size = scan.hidden_size
        self.share, self.seed = scan.manifest["share"], scan.manifest["settings"]["seed"]
        self.limit = len(scan)
        if config.max_memory:
            self.limit = max(1, config.max_memory // (_COPIES * token_bytes(self.hidden_size)))
        slices = of_each(self._slices, scan.paths, scan.sizes)
        self.slices = list(itertools.chain.from_iterable(slices))
        self._grouped: tuple[int, list] | None = None
        self._held: tuple[tuple[int, int], ScanTokens] | None = None

    def _slices(self, path: Location, n: int) -> list[ShardSlice]:
        """A shard in slices of which several fit into memory."""
        found, size = [], max(1, n if n <= self.limit else self.limit // 4)
        wanted = None
        if self.config.eval_fraction:
            (document,) = read_fields(path, ("document",))
            wanted = self._wanted(document)
        for at in range(0, n, size):
            tokens = slice(at, min(at + size, n))
            count = tokens.stop - at if wanted is None else int(wanted[tokens].sum())
            found.append(ShardSlice(path, tokens, count))
        return found

    def _wanted(self, document: torch.Tensor) -> torch.Tensor:
        example = self.scan.example(document)  # is held out with all its wishes
        return held_out(self.config.seed, example, self.config.eval_fraction) == self.measure

    def __len__(self) -> int:
        return sum(s.size for s in self.slices)

    def split(self) -> "tuple[ScanSource, ScanSource | None]":
        """What to learn from, and what to measure on, if anything."""
        if not self.config.eval_fraction:
            return self, None
        other = ScanSource(self.scan, self.config, self.device, lm_head=self.lm_head, measure=True)
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

    def _groups(self, epoch: int) -> list[tuple[int, list[ShardSlice], int]]:
        """(number, slices, tokens) of the groups of an epoch, in order; of the last one they are
        remembered."""
        if self._grouped is None or self._grouped[0] != epoch:
            self._grouped = epoch, self._groups_of(epoch)
        return self._grouped[1]

    def _groups_of(self, epoch: int) -> list[tuple[int, list[ShardSlice], int]]:
        groups, group, size = [], [], 0
        for index in _order(len(self.slices), self.config.seed, epoch).tolist():
            one = self.slices[index]
            if group and size + one.size > self.limit:
                groups.append((len(groups), group, size))
                group, size = [], 0
            group.append(one)
            size += one.size
        return [*groups, (len(groups), group, size)]

    def _group(self, epoch: int, number: int, slices: list[ShardSlice]) -> ScanTokens:
        """A group's tokens in the epoch's order; the last one is remembered."""
        if self._held is None or self._held[0] != (epoch, number):
            self._held = None  # freed before the next is read
            paths = (one.path for one in slices)
            tokens = list(of_each(lambda _, one: self._read(one), paths, slices))
            whole = ScanTokens.cat(tokens) if len(tokens) > 1 else tokens[0]
            del tokens
            order = _order(len(whole), self.config.seed, epoch, number)
            self._held = (epoch, number), whole[order]
        return self._held[1]

    def _read(self, one: ShardSlice) -> ScanTokens:
        tokens = read_shard(one.path, one.tokens)
        return tokens[self._wanted(tokens.document)] if self.config.eval_fraction else tokens

    def batches(self, epoch: int, step: int, rank: int, world: int) -> Iterator[Batch]:
        width = self.config.batch_tokens * world
        start, end = step * width, min((step + 1) * width, len(self))
        share = -(-(end - start) // world)
        start, end = start + rank * share, min(start + (rank + 1) * share, end)
        begin = 0
        for number, slices, size in self._groups(epoch):
            low, high = max(start, begin), min(end, begin + size)
            if low < high:
                tokens = self._group(epoch, number, slices)
                yield self._batch(tokens[low - begin : high - begin], epoch)
            begin += size

    def _batch(self, tokens: ScanTokens, epoch: int) -> Batch:
        tokens = tokens.to(self.device)
        where = tokens.document, tokens.position
        if self.scan.manifest["settings"]["all_tokens"]:
            uniform = token_uniform(self.config.seed, *where, epoch=epoch)
        else:  # what the scan selected stays selected
            uniform = scan_uniform(self.seed, *where) / self.share
        return Batch(
            tokens.hidden,
            tokens.target.long(),
            uniform,
            stats=tokens.stats(),
            weight=self.scan.weight(tokens),
            gravity=self._gravity(tokens),
        )

    def _gravity(self, tokens: ScanTokens) -> torch.Tensor | None:
        """λ of every token, where wishes make it differ."""
        if self.scan.variants == 1:
            return None
        gravities = gravities_of(self.config.gravity, self.config.wish_shift)
        return torch.tensor(gravities, device=self.device)[self.scan.wish(tokens)]
