"""An evaluation on disk.

    eval.json      what fixes a sample: settings, fingerprints of prompts, their ids, model and
                   heads
    samples.jsonl  a line a sample; a torn last line is dropped
    speed.jsonl    a line a batch: policy, samples, tokens, seconds
    part-0001/     samples.jsonl and speed.jsonl of process 1 of several, until they are put beside
                   the main one's: at the end, or when the run is continued

A finished run's samples are in the order of the policies in eval.json, and in that of one process,
however many drew them and however often they were killed.

A line of samples.jsonl holds: policy, prompt (its number from 0), sample, seed, text, tokens (ids),
temperature, kept and top_p (one a token), score, truncated, length. tokens and kept are null where
a server does not tell them, top_p where the policy does not predict it; score is null where the
scorer failed, until the run is continued.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from autodeco_fast.errors import parse_json, read_json_object
from autodeco_fast.files import append_text, write_text
from autodeco_fast.values import finite

MANIFEST, SAMPLES, SPEED = "eval.json", "samples.jsonl", "speed.jsonl"
_PART = "part-"  # and the number of a process
_BLOCK = 1 << 16  # bytes read at a time
Key = tuple[str, int, int]  # policy, prompt, sample


@dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl."""

    policy: str
    prompt: int
    sample: int
    seed: int
    text: str
    tokens: list[int] | None
    temperature: list[float] | None
    kept: list[int] | None
    score: float | None
    truncated: bool
    length: int  # in tokens
    top_p: list[float] | None = None

    @property
    def key(self) -> Key:
        return self.policy, self.prompt, self.sample

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def _numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(v) in (int, float) for v in value)


def _is_sample(value: object) -> bool:
    """Whether what JSON read has the fields of a sample, each of its type."""
    names = {field.name for field in fields(Sample)}
    if not isinstance(value, dict) or set(value) != names:
        return False
    counts = all(type(value[n]) is int and value[n] >= 0 for n in ("prompt", "sample", "length"))
    texts = all(isinstance(value[name], str) for name in ("policy", "text"))
    columns = (value["tokens"], value["temperature"], value["kept"], value["top_p"])
    lists = all(column is None or _numbers(column) for column in columns)
    score = value["score"] is None or type(value["score"]) in (int, float)
    return counts and texts and lists and score and type(value["truncated"]) is bool


def _sum(column: list | None) -> float | None:
    return None if column is None else float(sum(column))


@dataclass(frozen=True)
class Outcome:
    """What measures need of a sample; sums over its tokens, None where they are not known."""

    text: str
    score: float | None
    truncated: bool
    tokens: int
    temperature: float | None
    kept: float | None
    top_p: float | None = None

    @classmethod
    def of(cls, sample: Sample) -> "Outcome":
        return cls(
            text=sample.text,
            score=sample.score,
            truncated=sample.truncated,
            tokens=sample.length,
            temperature=_sum(sample.temperature),
            kept=_sum(sample.kept),
            top_p=_sum(sample.top_p),
        )


class _Lines:
    """The samples and speeds in a folder."""

    def __init__(self, folder: Path):
        """Raises ValueError for lines that are no samples."""
        self.folder, self.samples, self.speed = folder, folder / SAMPLES, folder / SPEED
        self.outcomes: dict[Key, Outcome] = {}
        for path in (self.samples, self.speed):
            _drop_torn_line(path)
        for sample in self.read():
            if sample.key in self.outcomes:
                raise ValueError(f"{self.samples} holds {sample.key} twice")
            self.outcomes[sample.key] = Outcome.of(sample)

    def __contains__(self, key: Key) -> bool:
        return key in self.outcomes

    def read(self) -> Iterator[Sample]:
        """All samples on disk.

        Raises:
            ValueError: naming a line that is none.
        """
        if not self.samples.exists():
            return
        with self.samples.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{self.samples}, line {number}"
                value = parse_json(line, where)
                if not _is_sample(value):
                    raise ValueError(f"{where} is no sample")
                yield Sample(**value)

    def append(self, samples: Iterable[Sample]) -> None:
        """Adds samples, all of them or none; those that are there already are left out."""
        new = [sample for sample in samples if sample.key not in self.outcomes]
        append_text(self.samples, "".join(sample.line() for sample in new))
        self.outcomes |= {sample.key: Outcome.of(sample) for sample in new}

    def note_speed(self, policy: str, *, samples: int, tokens: int, seconds: float) -> None:
        """Adds a batch to speed.jsonl."""
        noted = {"policy": policy, "samples": samples, "tokens": tokens, "seconds": seconds}
        append_text(self.speed, json.dumps(noted, ensure_ascii=False) + "\n")


class Part(_Lines):
    """What a process that is not the main one adds to a run that the main one has begun."""

    def __init__(self, folder: Path, rank: int):
        begun = _Lines(folder)
        part = folder / f"{_PART}{rank:04d}"
        part.mkdir()
        super().__init__(part)
        self.outcomes = begun.outcomes


class Store(_Lines):
    """The samples of a run that begins or continues in a folder."""

    def __init__(self, folder: Path, manifest: dict):
        """
        Args:
            manifest: what must be the same for a run to be continued. But `policies` maps texts to
                fingerprints, and may grow; where `scorer` is another, all is to be scored again.

        Raises:
            ValueError: if the folder holds another run, or lines that are no samples.
        """
        self.folder, self.samples = folder, folder / SAMPLES
        self.manifest = self._begun(manifest)
        super().__init__(folder)
        self.take_parts()
        another = self.manifest["scorer"] != manifest["scorer"]
        self.to_score = {key for key, o in self.outcomes.items() if another or o.score is None}
        if another and not self.to_score:
            self._write_manifest(scorer=manifest["scorer"])

    def take_parts(self) -> None:
        """Puts what other processes have drawn beside the rest."""
        for folder in sorted(self.folder.glob(f"{_PART}*")):
            part = _Lines(folder)
            self.append(part.read())
            if part.speed.exists():
                append_text(self.speed, part.speed.read_text(encoding="utf-8"))
            shutil.rmtree(folder)

    def sort(self, prompts: Sequence[int]) -> None:
        """Puts the lines in the order of the policies, and of these prompts, if they are not."""
        policies = {text: i for i, text in enumerate(self.manifest["policies"])}
        place = {prompt: i for i, prompt in enumerate(prompts)}

        def order(key: Key) -> tuple[int, int, int]:
            policy, prompt, sample = key
            return policies.get(policy, -1), place.get(prompt, -1), sample

        ordered = sorted(self.outcomes, key=order)
        if ordered == list(self.outcomes):
            return
        found = {sample.key: sample for sample in self.read()}
        self.rewrite([found[key] for key in ordered], self.manifest["scorer"])

    def _begun(self, manifest: dict) -> dict:
        """The manifest on disk, with what is new in this one."""
        path = self.folder / MANIFEST
        if not path.exists():
            if self.samples.exists():
                raise ValueError(f"output {str(self.folder)!r} holds {SAMPLES}, but no {MANIFEST}")
            self.manifest = manifest
            self._write_manifest()
            return manifest
        self.manifest = found = read_json_object(path)
        for name in [name for name in manifest | found if name not in ("policies", "scorer")]:
            if found.get(name) != manifest.get(name):
                raise ValueError(
                    f"output {str(self.folder)!r} holds another run: {name} {found.get(name)!r}, "
                    f"not {manifest.get(name)!r}"
                )
        before = found.get("policies")
        if not isinstance(before, dict) or "scorer" not in found:
            raise ValueError(f"{path} is no manifest of an evaluation")
        changed = [
            text for text, said in manifest["policies"].items() if before.get(text, said) != said
        ]
        if changed:
            raise ValueError(
                f"output {str(self.folder)!r} holds another run: {changed[0]!r} was another head"
            )
        self._write_manifest(policies={**before, **manifest["policies"]})
        return self.manifest

    def _write_manifest(self, **changes) -> None:
        self.manifest = {**self.manifest, **changes}
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False)
        write_text(self.folder / MANIFEST, text + "\n")

    def rewrite(self, samples: Sequence[Sample], scorer: str) -> None:
        """Puts these samples, all scored by one scorer, in place of those that are there."""
        write_text(self.samples, "".join(sample.line() for sample in samples))
        self._write_manifest(scorer=scorer)
        self.outcomes = {sample.key: Outcome.of(sample) for sample in samples}
        self.to_score = set()

    def speeds(self) -> dict[str, float]:
        """policy → tokens a second, over all batches."""
        path = self.speed
        sums: dict[str, list[float]] = {}
        if path.exists():
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    where = f"{path}, line {number}"
                    noted = parse_json(line, where)
                    keys = {"policy", "samples", "tokens", "seconds"}
                    if not isinstance(noted, dict) or set(noted) != keys:
                        raise ValueError(f"{where} is no batch")
                    total = sums.setdefault(str(noted["policy"]), [0.0, 0.0])
                    total[0] += finite(f"{where}: tokens", noted["tokens"])
                    total[1] += finite(f"{where}: seconds", noted["seconds"])
        return {policy: tokens / seconds for policy, (tokens, seconds) in sums.items() if seconds}


def _drop_torn_line(path: Path) -> None:
    """Cuts what stands after the last end of a line: a write that was killed."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        at = end = file.seek(0, os.SEEK_END)
        while at:
            start = max(0, at - _BLOCK)
            file.seek(start)
            found = file.read(at - start).rfind(b"\n")
            if found >= 0:
                at = start + found + 1
                break
            at = start
        if at < end:
            file.truncate(at)
