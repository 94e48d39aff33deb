"""`autodeco-fast eval`: policies on the same prompts under the same noise, scored and measured."""

import json
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path

import torch
from rich.console import Console

from autodeco_fast import __version__
from autodeco_fast.errors import read_json_object
from autodeco_fast.files import write_text
from autodeco_fast.policies import Policy, parse
from autodeco_fast.training.console import progress_bar
from autodeco_fast.training.eval_config import EvalConfig, named_policies
from autodeco_fast.training.eval_measures import (
    Bootstrap,
    Measured,
    diversities,
    of_prompt,
    summarised,
)
from autodeco_fast.training.eval_requests import Drawn, Request, Source, batches
from autodeco_fast.training.eval_source import policy_fingerprint, source_of
from autodeco_fast.training.eval_store import Part, Sample, Store
from autodeco_fast.training.eval_verdict import FIXED, over_fixed
from autodeco_fast.training.processes import Processes, several, start_accelerator
from autodeco_fast.training.prompts import Prompt, read_prompts
from autodeco_fast.training.scan_store import fingerprint
from autodeco_fast.training.scorers import Scorer, load_scorer

RESULTS, PAGE = "results.json", "eval.html"
# 1: texts lost the space they began with, and greedy rows could take any of ties.
# 2: a model's own generation settings counted, and special tokens ended no sample.
FORMAT = 3
ALL, OTHER = "all", "other"  # the names of all tasks together, and of the prompts without one
_LIBRARIES = ("torch", "transformers", "triton", "numpy", "math-verify")


@dataclass(frozen=True)
class Entry:
    """A policy of the run, under the text and in the family it is shown by."""

    text: str
    family: str
    policy: Policy


def entries(config: EvalConfig, policies: Sequence[Policy] = ()) -> list[Entry]:
    """The policies of a run: those of the settings, then others.

    Raises:
        ValueError: for a text that is none, one that is there twice, or none at all.
    """
    found: dict[str, Entry] = {}
    named = [(parse(text), family) for text, family in named_policies(config).items()]
    for policy, family in (*named, *((policy, None) for policy in policies)):
        text = str(policy)
        if text in found:
            raise ValueError(f"policy must be there once, got {text!r} twice")
        found[text] = Entry(text, family or family_of(text), policy)
    if not found:
        raise ValueError("policy must name at least one, like 'static T=0.7 min_p=0.1'")
    return list(found.values())


def family_of(text: str) -> str:
    """What a policy is without its numbers: `static T min_p`."""
    return " ".join(word.partition("=")[0] for word in shlex.split(text))


def evaluate(
    config: EvalConfig,
    *,
    policies: Sequence[Policy] = (),
    console: Console | None = None,
    accelerator=None,
) -> dict:
    """Draws what is missing, scores, measures, and writes results.json and eval.html.

    A run that was killed is continued by the same call; so is one with more policies, or with
    another scorer, for which nothing is drawn again. Several processes draw and score some batches
    each; results and samples are those of one.

    Args:
        policies: beside those of the settings: of classes of your own, say.
        console: of the progress and the tables; standard error by default.
        accelerator: one of `accelerate`, for several processes; made here if a launcher has started
            them.

    Returns:
        What results.json holds: `settings`, `versions`, `policies`, each with `tasks` (task →
        measure → mean, low, high), `over_fixed` (task → measure of diversity → score less that of
        fixed settings as diverse) and `prompts` (measures of each).

    Raises:
        ValueError: for input that cannot be used, before a model is loaded where possible; for
            another run in the output; for a scorer that fails, when all that was drawn is written;
            where another process has ended.
    """
    prompts, scorer = read_prompts(config.prompts), load_scorer(config.scorer)
    check_tasks(prompts)
    scorer.check(prompts)
    compared = entries(config, policies)
    mine = accelerator is None and several()
    accelerator = start_accelerator() if mine else accelerator
    processes = Processes(accelerator)
    console = console or Console(stderr=True, markup=False, quiet=not processes.is_main)
    with processes.hold(config.output):
        source, identity = source_of(config, prompts, accelerator and accelerator.device)
        for entry in compared:
            source.check(entry.policy)
        run = Run(config, prompts=prompts, scorer=scorer, compared=compared, source=source)
        store = run.begin(identity, processes)
        run.draw(store, console, processes)
        processes.wait()
        if processes.is_main:
            store.take_parts()
            store.sort(run.order)
            results = run.results(store)
            _write(results, run, store, console)
        processes.wait()
        if not processes.is_main:
            results = read_json_object(config.output / RESULTS)
    if mine:
        accelerator.end_training()  # several processes must close their group before they exit
    return results


class Run:
    """One evaluation: what is drawn, how it is scored, what comes out."""

    def __init__(
        self,
        config: EvalConfig,
        *,
        prompts: Sequence[Prompt],
        scorer: Scorer,
        compared: Sequence[Entry],
        source: Source,
    ):
        self.config, self.prompts, self.scorer = config, prompts, scorer
        self.compared, self.source = compared, source
        self.plan = batches(
            source,
            prompts=len(prompts),
            samples=config.samples,
            size=config.batch_size,
            seed=config.seed,
        )

    def manifest(self, identity: dict) -> dict:
        """What fixes a sample, and by what it was scored."""
        return {
            "format": FORMAT,
            "prompts": fingerprint(self.config.prompts.read_bytes()),
            "seed": self.config.seed,
            "max_new_tokens": self.config.max_new_tokens,
            "stop": list(self.config.stop),
            **identity,
            "policies": {entry.text: policy_fingerprint(entry.policy) for entry in self.compared},
            "scorer": self.scorer.identity,
        }

    @property
    def order(self) -> list[int]:
        """The prompts in the order in which they are drawn."""
        return list(dict.fromkeys(request.prompt for batch in self.plan for request in batch))

    def begin(self, identity: dict, processes: Processes) -> Store | Part:
        """What this process adds samples to, once all processes know what is there."""
        folder = self.config.output
        if processes.is_main:
            store = Store(folder, self.manifest(identity))
            self.score_again(store)
        processes.wait()
        if not processes.is_main:
            store = Part(folder, processes.rank)
        processes.wait()  # the main one must not write what the others still read
        return store

    def score_again(self, store: Store) -> None:
        """Scores samples whose scorer failed, or all, if another scored them."""
        if not store.to_score:
            return
        samples, size = list(store.read()), self.config.batch_size
        due = [s for s in samples if s.key in store.to_score]
        scores = {}
        for i in range(0, len(due), size):
            chunk = due[i : i + size]
            found = self.scorer.scores(
                [self.prompts[s.prompt] for s in chunk], [s.text for s in chunk]
            )
            scores |= zip((s.key for s in chunk), found)
        scored = [replace(s, score=scores.get(s.key, s.score)) for s in samples]
        store.rewrite(scored, self.scorer.identity)

    def draw(self, store: Store | Part, console: Console, processes: Processes) -> None:
        """Draws this process's share of what is missing."""
        missing = [
            [b for b in self.plan if any(_key(entry, r) not in store for r in b)]
            for entry in self.compared
        ]
        mine = _dealt(missing, processes)
        of_others = sum(map(_size, missing)) - sum(map(_size, mine))
        with progress_bar(console) as move:
            move(total=_size(self.plan) * len(self.compared) - of_others, completed=0)
            for number, entry in enumerate(self.compared):
                done = _size(self.plan) - _size(missing[number])
                about = f"policy {number + 1} of {len(self.compared)}: {entry.text}"
                move(advance=done, description=about)
                if mine[number]:
                    self._draw_under(entry, mine[number], store, move=move)

    def _draw_under(
        self, entry: Entry, missing: list[list[Request]], store: Store | Part, *, move: Callable
    ) -> None:
        with self.source.under(entry.policy) as draw:
            for requests in missing:
                began = time.perf_counter()
                drawn = draw(requests)
                seconds = time.perf_counter() - began
                tokens = sum(d.length for d in drawn)
                self._keep(entry, requests, drawn, store=store)
                store.note_speed(
                    entry.text, samples=len(drawn), tokens=tokens, seconds=round(seconds, 6)
                )
                move(
                    advance=len(drawn),
                    description=f"samples, {tokens / seconds:,.0f} tokens/s, {entry.text}",
                )

    def _keep(
        self, entry: Entry, requests: list[Request], drawn: list[Drawn], *, store: Store | Part
    ) -> None:
        """Scores and writes a batch; unscored, if the scorer fails."""
        scores: list[float | None] = [None] * len(drawn)
        try:
            scores = self.scorer.scores(
                [self.prompts[r.prompt] for r in requests], [d.text for d in drawn]
            )
        finally:
            store.append(
                Sample(policy=entry.text, score=score, **asdict(request), **asdict(d))
                for request, d, score in zip(requests, drawn, scores)
            )

    def results(self, store: Store) -> dict:
        """What results.json holds."""
        speeds = store.speeds()
        measured = {
            entry.text: [self._measured(entry, p, store) for p in range(len(self.prompts))]
            for entry in self.compared
        }
        verdicts = self._verdicts(measured)
        policies = [
            {
                "policy": entry.text,
                "family": entry.family,
                "tokens_per_second": speeds.get(entry.text),
                "tasks": {
                    task: {name: asdict(interval) for name, interval in measures.items()}
                    for task, measures in by_task(measured[entry.text]).items()
                },
                "over_fixed": verdicts.get(entry.text, {}),
                "prompts": [_values(m) for m in measured[entry.text]],
            }
            for entry in self.compared
        ]
        settings = asdict(self.config)
        for name, value in settings.items():
            if isinstance(value, (Path, tuple)):  # as JSON reads them back
                settings[name] = str(value) if isinstance(value, Path) else list(value)
        return {"settings": settings, "versions": versions(), "policies": policies}

    def _verdicts(self, measured: dict[str, list[Measured]]) -> dict[str, dict]:
        """Policy → task → measure of diversity → its score less that of fixed settings there."""
        fixed = [e.text for e in self.compared if e.policy.kind in FIXED]
        others = [e.text for e in self.compared if e.policy.kind not in FIXED]
        found: dict[str, dict] = {text: {} for text in others}
        if not (fixed and others):
            return found
        kinds = diversities(self.scorer.record is not None)
        groups = {text: tasks_of(m) for text, m in measured.items()}
        for task in groups[others[0]]:
            for kind in kinds:
                of = [[groups[text][task] for text in texts] for texts in (fixed, others)]
                for text, interval in zip(others, over_fixed(*of, kind)):
                    found[text].setdefault(task, {})[kind] = asdict(interval)
        return found

    def _measured(self, entry: Entry, prompt: int, store: Store) -> Measured:
        outcomes = [
            store.outcomes[entry.text, prompt, sample] for sample in range(self.config.samples)
        ]
        return of_prompt(
            self.prompts[prompt],
            outcomes,
            self.scorer,
            success=self.config.success,
            records=self.config.records,
        )


def _key(entry: Entry, request: Request) -> tuple[str, int, int]:
    return entry.text, request.prompt, request.sample


def _size(batches: Sequence[list[Request]]) -> int:
    """Of batches, in samples."""
    return sum(map(len, batches))


def _dealt(missing: list[list[list[Request]]], processes: Processes) -> list[list[list[Request]]]:
    """This process's share of the batches of every policy, dealt out one after another."""
    number = count()
    return [
        [batch for batch in batches if next(number) % processes.world == processes.rank]
        for batches in missing
    ]


def _values(measured: Measured) -> dict:
    """Measures of one prompt; None where there is nothing to measure."""
    values = {name: a / b if b else None for name, (a, b) in measured.pairs.items()}
    return {"line": measured.prompt.line, "task": measured.prompt.task, **values}


def check_tasks(prompts: Sequence[Prompt]) -> None:
    """Raises ValueError for a task whose name stands for other prompts in the results."""
    tasks = {prompt.task for prompt in prompts}
    taken = {ALL: "all prompts", **({OTHER: "prompts without a task"} if "" in tasks else {})}
    for prompt in prompts:
        if prompt.task in taken and len(tasks) > 1:
            raise ValueError(
                f"prompts, line {prompt.line}: task must be another name than {prompt.task!r}, "
                f"which stands for {taken[prompt.task]}"
            )


def tasks_of(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """All prompts, then those of each task, if there is more than one."""
    tasks = list(dict.fromkeys(m.prompt.task for m in measured))
    groups = {ALL: list(measured)}
    if len(tasks) > 1:
        groups |= {task or OTHER: [m for m in measured if m.prompt.task == task] for task in tasks}
    return groups


def by_task(measured: Sequence[Measured]) -> dict[str, dict]:
    """Measures over all prompts, then over those of each task."""
    return {
        task: summarised(group, _bootstrap(len(group)))
        for task, group in tasks_of(measured).items()
    }


@lru_cache(maxsize=16)
def _bootstrap(prompts: int) -> Bootstrap:
    return Bootstrap(prompts)


def versions() -> dict[str, str]:
    """Of this library, what it stands on, and the machine."""
    found = {"autodeco-fast": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {**found, "device": device or platform.machine()}


def _write(results: dict, run: Run, store: Store, console: Console) -> None:
    from autodeco_fast.training.eval_page import page, show_tables

    output = run.config.output
    write_text(output / RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    tokenizer = getattr(run.source, "tokenizer", None)
    write_text(output / PAGE, page(results, run.prompts, store.read(), tokenizer))
    if not show_tables(console, results):
        console.print(f"the other measures are in {PAGE}")
    console.print(f"written to {output}: {PAGE}, {RESULTS}, samples.jsonl", soft_wrap=True)
