"""Errors against diversity: policies with a head beside the best static settings.

    python -m bench.quality.frontier EVALUATION … --output NAME

Reads folders of `autodeco-fast eval`, of records (`--scorer json`) or of the sums language; writes
the record and the figure NAME to `bench/results/quality`. For each policy, over prompts and
training seeds:

    error      share of samples that are not valid
    diversity  entropy of a field's values in valid samples, over its highest possible; mean over
               fields and prompts. Of a field whose values have no number it is that of `RECORDS`
               samples.

A policy is compared with static settings at equal diversity: the lower edge of their points, two
neighbours of it joined by a line, picked on the very samples it is compared on, in their favour.
Intervals are 95 % of bootstrap resamples: of a head's seeds, which must have had noise of their
own; of a policy without seeds, of samples within prompts. There is none of no errors, which have no
width. Heads in folders `…-seed0`, `…-seed1` are one policy.
"""

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from autodeco_fast.training.eval_measures import entropy_at
from autodeco_fast.training.eval_verdict import frontier_score
from autodeco_fast.training.prompts import read_prompts
from autodeco_fast.training.scorers import parse_record
from bench.machine import RESULTS
from bench.quality import sums
from bench.quality.figures import figure
from bench.quality.resampling import interval, seed_deviations
from bench.records import write

RESAMPLES, RECORDS = 300, 32
SUMS = "bench.quality.sums:validity"
FOLDER = RESULTS / "quality"
STATIC = ("static", "greedy")


@dataclass
class Lines:
    """What a policy of one seed wrote for one prompt: None where it is no valid record."""

    task: str
    fields: dict[str, float]  # → how many values there are
    records: list[dict[str, str] | None]
    temperatures: list[float]
    also: dict[str, float] = field(default_factory=dict)  # fields that diversity leaves out
    noise: int = 0  # the evaluation's seed

    def entropies(self, picks: Sequence[int], fields: dict[str, float] | None = None) -> list:
        """Of each field, over its highest possible; 0 for fewer than two records."""
        valid = [record for i in picks if (record := self.records[i]) is not None]
        found = []
        for key, values in (fields or self.fields).items():
            counts = list(Counter(r[key].casefold() for r in valid).values())
            if values == math.inf:
                m, most = min(RECORDS, len(valid)), min(RECORDS, len(picks))
                # Fewer valid ones cannot be as various as all of them.
                found.append(entropy_at(counts, m) / math.log(most) if m > 1 else 0.0)
            else:
                found.append(min(1.0, _entropy(counts) / math.log(values)))
        return found


def _entropy(counts: Sequence[int]) -> float:
    """In nats, of the distribution that values were drawn from so often, without the first term of
    what few draws lack (Miller and Madow, 1955)."""
    n = sum(counts)
    if not n:
        return 0.0
    return sum(-c / n * math.log(c / n) for c in counts) + (len(counts) - 1) / (2 * n)


Study = dict[str, dict[str, list[Lines]]]  # policy → seed → lines, one a prompt


def named(policy: str) -> str:
    """A policy without folders and seeds."""
    name = re.sub(r"^(head|autodeco)=\S*?([^/\s]+)(\s|$)", r"\1=\2\3", policy)
    return re.sub(r"-seed\d+", "", name)


def _seed(policy: str) -> str:
    found = re.search(r"-seed(\d+)(\s|$)", policy)
    return found.group(1) if found else "0"


def _of_sums(text: str, fields: dict) -> dict[str, str] | None:
    record = sums.parse(fields["prompt"] + text + sums.END)
    return record and {key: str(value) for key, value in record.items()}


def read(folders: Sequence[Path]) -> Study:
    """The samples of evaluations."""
    found: Study = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        settings = json.loads((folder / "results.json").read_text())["settings"]
        of_sums = settings["scorer"] == SUMS
        parse = _of_sums if of_sums else parse_record
        prompts = read_prompts(Path(settings["prompts"]))
        lines: dict[tuple[str, int], Lines] = {}
        with (folder / "samples.jsonl").open(encoding="utf-8") as file:
            for sample in map(json.loads, file):
                key, prompt = (sample["policy"], sample["prompt"]), prompts[sample["prompt"]]
                keys = sums.VALUES if of_sums else dict.fromkeys(prompt.fields["keys"], math.inf)
                also = sums.OTHER_VALUES if of_sums else {}
                new = Lines(prompt.task, keys, [], [], also, settings["seed"])
                one = lines.setdefault(key, new)
                one.records.append(parse(sample["text"], prompt.fields))
                one.temperatures += sample["temperature"]
        for (policy, _), one in lines.items():
            found[named(policy)][_seed(policy)].append(one)
    return found


def _point(lines: Sequence[Lines], rng: np.random.Generator | None) -> tuple[float, float]:
    """Error and diversity of the lines of one seed; of a resample of each, with a generator."""
    errors, diversities = [], []
    for line in lines:
        n = len(line.records)
        picks = np.arange(n) if rng is None else rng.integers(n, size=n)
        errors.append(np.mean([line.records[i] is None for i in picks]))
        diversities.append(np.mean(line.entropies(picks)))
    return float(np.mean(errors)), float(np.mean(diversities))


def centre(seeds: dict[str, list[Lines]]) -> np.ndarray:
    """`[2]` error and diversity, means over seeds."""
    return np.mean([_point(lines, None) for lines in seeds.values()], 0)


def points(seeds: dict[str, list[Lines]], resamples: int = RESAMPLES) -> np.ndarray:
    """`[resamples + 1, 2]` error and diversity, means over seeds; the first is of all samples.

    Of one seed the same samples are taken for every policy that has as many: their noise was the
    same. A resample holds samples twice, so its entropies are low: resamples are moved to the mean
    of the first.

    Raises:
        ValueError: for seeds that drew with the same noise: their errors would not be independent.
    """
    every = np.array([_point(lines, None) for lines in seeds.values()])
    if len(seeds) > 1:
        noises = [lines[0].noise for lines in seeds.values()]
        if len({*noises}) < len(noises):
            raise ValueError(f"seeds of a head must draw with noise of their own, got {noises}")
        deviations = seed_deviations(every, resamples)
    else:
        (lines,), rng = seeds.values(), np.random.default_rng(0)
        deviations = np.array([_point(lines, rng) for _ in range(resamples)])
        deviations -= deviations.mean(0)
    return np.concatenate([every.mean(0)[None], every.mean(0) + deviations]).clip(0, 1)


def static_error(error: np.ndarray, diversity: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of the static settings at some diversities: on their lower edge, linear between its points;
    that of the most diverse beyond it."""
    return 1 - frontier_score(1 - error, diversity, np.minimum(at, diversity.max()))


def compare(head: np.ndarray, static: list[np.ndarray]) -> dict[str, float | list[float] | None]:
    """Errors of a head over those of static settings at its diversity: as `over`."""
    theirs = []
    for r in range(len(head)):
        error, diversity = (np.array([s[r, i] for s in static]) for i in (0, 1))
        theirs.append(static_error(error, diversity, head[r, 1:]))
    theirs = np.array(theirs)
    return {"error_of_static_at_equal_diversity": float(theirs[0, 0]), **over(head, theirs)}


def results(study: Study) -> list[dict]:
    """A result a policy."""
    found = {name: points(seeds) for name, seeds in study.items()}
    static = [p for name, p in found.items() if name.split()[0] in STATIC]
    out = []
    for name, p in found.items():
        lines = [line for seed in study[name].values() for line in seed]
        result = {
            "variant": name,
            "error": float(p[0, 0]),
            "error_95": interval(p[:, 0]) if p[0, 0] else None,  # none of no errors
            "diversity": float(p[0, 1]),
            "diversity_95": interval(p[:, 1]),
            "temperature": float(np.mean([np.mean(line.temperatures) for line in lines])),
            "seeds": len(study[name]),
            "by_task": _by_task(lines),
        }
        if static and name.split()[0] not in STATIC:
            result |= compare(p, static)
        out.append(result)
    return out


def best_at(study: Study, diversities: Sequence[float]) -> list[str]:
    """The policies that make the fewest errors among those at least as diverse as each of these."""
    found, measured = [], {name: centre(seeds) for name, seeds in study.items()}
    for least in diversities:
        able = [name for name, (_, diversity) in measured.items() if diversity >= least]
        if able:
            found.append(min(able, key=lambda name: measured[name][0]))
    return list(dict.fromkeys(found))


def over(errors: np.ndarray, others: np.ndarray) -> dict[str, float | list[float] | None]:
    """Errors of a policy over those of another, the first columns of what `points` gives, with a
    95 % interval.

    Where the policy made no error there is no interval: resamples of no errors have none, so its
    width would say 0. Nor is there one where more than a fortieth of the other's resamples have no
    error. Where the other made none there is no ratio either.
    """
    ours, theirs = errors[:, 0], others[:, 0]
    if not theirs[0]:
        return {"ratio": None, "ratio_95": None}
    ratio = ours / theirs.clip(1e-9)
    known = ours[0] > 0 and np.mean(theirs == 0) <= 0.025
    return {"ratio": float(ratio[0]), "ratio_95": interval(ratio) if known else None}


def _by_task(lines: Sequence[Lines]) -> dict[str, dict]:
    """Share of valid samples and entropies of fields, by task."""
    found: dict = {}
    for name in dict.fromkeys(line.task for line in lines):
        some = [line for line in lines if line.task == name]
        every = range(len(some[0].records))
        fields = some[0].fields | some[0].also
        entropies = np.mean([line.entropies(every, fields) for line in some], 0)
        found[name] = {
            "valid": float(np.mean([[r is not None for r in line.records] for line in some])),
            "entropies": dict(zip(fields, map(float, entropies))),
        }
    return found


def _family(policy: str) -> str:
    """What a policy is called in the figure: a head by its objective, a rule by its name."""
    name = policy.split()[0]
    if name in STATIC:
        return "fixed settings"
    objective = re.sub(r"-[\d.]+$", "", name.partition("=")[2])
    return f"head: {objective}" if objective else name


def _bars(members: Sequence[dict], key: str) -> np.ndarray:
    """`[2, members]` from a value down and up to the ends of its interval; 0 without one."""
    ends = [m[f"{key}_95"] or [m[key]] * 2 for m in members]
    return np.abs(np.array(ends).T - [m[key] for m in members])


def draw(results: list[dict], path: Path, *, least: float = 0.0) -> None:
    """The figure: settings, the static ones' lower edge, policies by family. What makes twice as
    many errors as the end of that edge is not in it.

    Args:
        least: the diversity that it begins at.
    """
    fixed = [r for r in results if _family(r["variant"]) == "fixed settings"]
    end = max(fixed, key=lambda r: r["diversity"])["error"] if fixed else 1.0
    results = [r for r in results if r["error"] <= 2 * end]
    with figure(path, (8.4, 4.6)) as (whole, axes):
        families: dict[str, list[dict]] = defaultdict(list)
        for result in results:
            families[_family(result["variant"])].append(result)
        for number, (family, members) in enumerate(families.items()):
            x, y = ([m[key] for m in members] for key in ("diversity", "error"))
            bars = [_bars(members, key) for key in ("diversity", "error")]
            colour = f"C{number % 10}"
            style = {
                "fmt": "os^"[number // 10],
                "ms": 4,
                "lw": 0.8,
                "color": colour,
                "label": family,
            }
            axes.errorbar(x, y, xerr=bars[0], yerr=bars[1], **style)
            if family == "fixed settings":
                at = np.linspace(min(x), max(x), 200)
                axes.plot(at, static_error(np.array(y), np.array(x), at), color=colour)
        axes.set_xlabel("diversity: entropy of a field's values, 1 = as high as can be")
        axes.set_ylabel("errors: share of samples that are not valid")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=least or None)
        axes.grid(alpha=0.3)
        whole.legend(loc="outside right upper", frameon=False, fontsize=8)


def print_ranking(found: list[dict], axis: str) -> None:
    """A line a policy, in the order of what is held against its errors."""
    for one in sorted(found, key=lambda r: r[axis]):
        ratio = ""
        if one.get("ratio") is not None:
            ratio = f"  ratio {one['ratio']:.2f} {one['ratio_95'] or ''}".rstrip()
        print(f"{one['error']:.4f}  {one[axis]:.3f}  {one['variant']}{ratio}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("evaluations", nargs="+", type=Path, help="folders of autodeco-fast eval")
    parser.add_argument("--output", required=True, help="name of the record and the figure")
    args = parser.parse_args(arguments)
    publish(results(read(args.evaluations)), args.output)


def publish(found: list[dict], name: str, *, least: float = 0.0, **facts: object) -> None:
    """Writes the record and the figure, and prints a line a policy."""
    write(FOLDER / f"{name}.json", name, found, **facts)
    draw(found, FOLDER / f"{name}.png", least=least)
    print_ranking(found, "diversity")


if __name__ == "__main__":
    main()
