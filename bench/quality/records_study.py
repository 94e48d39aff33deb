"""SmolLM2 writing records: heads by every objective beside a grid of static settings.

    python -m bench.quality.records_study FOLDER [--model FOLDER] [--jobs N]

trains heads, chooses settings on the validation schemas (as many as the static grid has), trains
what is to be measured for four more seeds, evaluates it on the test schemas and writes the record
and the figure `records`; a GPU helps. What the folder has already is not made again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.demo import records, smollm2
from autodeco_fast.files import write_text
from bench.quality import frontier

STATIC = Path(__file__).with_name("static.txt")
RULES = ("top_n_sigma n=1", "p_less T=1", "min_k T=1", "entropy a=0.4", "edt t0=1 theta=0.3")
# Measured after the heads, to leave no hole where these are: hot settings with a Min-P that holds
# them, and more of every rule.
MORE_STATIC = tuple(
    f"static {settings}"
    for settings in (
        *("T=1 min_p=0.05", "T=1.2 min_p=0.1", "T=1.3 min_p=0.1", "T=1.3 min_p=0.3"),
        *("T=1.5 min_p=0.2", "T=1.5 min_p=0.3", "T=2 min_p=0.2", "T=2 min_p=0.3", "T=2 min_p=0.4"),
        *("T=3 min_p=0.4", "T=1 top_p=0.8", "T=1.3 top_p=0.7"),
    )
)
MORE_RULES = (
    *(f"top_n_sigma n={n} T={T}" for n, T in ((0.5, 1), (0.7, 1), (0.5, 1.5), (0.7, 1.5))),
    *(f"top_n_sigma n={n} T=2" for n in (0.3, 0.5)),
    *(f"p_less T={T}" for T in (1.3, 1.6, 2, 3)),
    *(f"min_k tau={tau} T={T}" for tau, T in ((3, 1.5), (3, 2), (6, 1), (6, 1.5), (10, 1.5))),
    *(f"entropy a={a} min_p=0.1" for a in (0.4, 0.7, 1, 1.4)),
    *(f"entropy a={a} power=0.5 min_p=0.1" for a in (0.7, 1, 1.4)),
    *(f"entropy a={a} min_p=0.2" for a in (0.7, 1)),
    *(f"edt t0=0.7 theta={theta}" for theta in (0.1, 0.3)),
    *(f"edt t0={t0} theta={theta} min_p=0.1" for t0, theta in ((1, 0.3), (1.3, 0.3), (1.6, 1))),
)
SHIPPED = (f"head={smollm2.HEAD}", f"head={smollm2.HEAD} scale=0.7")  # of an earlier study
SEEDS = (0, 1, 2, 3, 4)  # settings are chosen with heads of the first
ENTROPY_WEIGHTS, GRAVITIES = (0.02, 0.01, 0.005), (0.1, 0.15, 0.2)
SCALES = ("", "scale=0.7", "scale=0.85", "scale=1.2", "scale=1.4")
TARGETS = (0.75, 0.8, 0.85, 0.9)  # diversities that a setting is chosen for
BEGUN, ITS_HINGE = "rewards-from-hinge-0.01", "hinge-0.2"  # with β; what these heads begin as
ALWAYS = ("rewards-0.02", "rewards-0.01", BEGUN, "autodeco", "hinge-0.2")  # measured, as they are
THREE_EPOCHS = ("--num-train-epochs", "3")
DOCUMENT = 3000  # characters
ROUNDS, GENERATIONS = 15, 8
SAMPLES = 96  # of a schema under a static setting or a rule
HEAD_SAMPLES = 48
TRIED_SAMPLES = 32  # of a validation schema, to choose by


def documents() -> list[str]:
    """Python's own reference manual, which every installation has, in pieces."""
    found = []
    for text in topics.values():
        found.append("")
        for paragraph in text.split("\n\n"):
            if found[-1] and len(found[-1]) + len(paragraph) > DOCUMENT:
                found.append("")
            found[-1] += paragraph + "\n\n"
    return found


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "autodeco_fast", *map(str, arguments)]


def together(commands: list[list[str]], jobs: int) -> None:
    """Runs commands, so many at once; what they print beside errors is left out."""
    waiting, running = list(commands), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(subprocess.Popen(waiting.pop(0), stdout=subprocess.DEVNULL))
        process = running.pop(0)
        if process.wait():
            sys.exit(f"failed: {' '.join(process.args)}")


def _trained(command: list[str]) -> bool:
    return (Path(command[command.index("--output") + 1]) / CONFIG_NAME).exists()


class Study:
    """The folder of a study and what is in it."""

    def __init__(self, work: Path, model: str, *, jobs: int):
        self.work, self.model, self.jobs = work, model, jobs
        self.scan = work / "scan"
        self.text = ("--model", model, "--data", work / "documents.jsonl")
        records.write(work)
        lines = (json.dumps({"text": text}) + "\n" for text in documents())
        write_text(work / "documents.jsonl", "".join(lines))

    def head(self, name: str, seed: int) -> Path:
        return self.work / "heads" / f"{name}-seed{seed}"

    def train(self, names: set[str], seeds: Sequence[int]) -> None:
        """Those of these heads that are not there yet; one that begins as another comes after
        it."""
        hinge, others = [], []
        if BEGUN in names:
            names = {*names, ITS_HINGE}
        for seed in seeds:
            for name in sorted(names):
                some = hinge if name.startswith("hinge") else others
                made = self._command(name, seed)
                if not _trained(made):
                    some.append(made)
        if hinge:
            size = ("--batch-tokens", 16384)
            together([command("scan", *self.text, "--output", self.scan, *size)], 1)
        together(hinge, self.jobs)
        together(others, self.jobs)

    def _command(self, name: str, seed: int) -> list[str]:
        """That trains a head."""
        kind, _, number = name.rpartition("-")
        if kind == "hinge":
            return self._from(name, seed, "--scan", self.scan, "--gravity", number, *THREE_EPOCHS)
        if name == "autodeco":
            objective = ("--objective", "autodeco_temperature", "--min-p", "1e-6")
            size = ("--per-device-train-batch-size", "8")
            return self._from(name, seed, *self.text, *objective, *size)
        begun = ("--head", self.head(ITS_HINGE, seed)) if name == BEGUN else ()
        return self._rewards(name, seed, float(number), *begun)

    def _from(self, name: str, seed: int, *options: object) -> list[str]:
        own = ("--output", self.head(name, seed), "--seed", seed, "--resume")
        return command("train", *options, *own)

    def _rewards(self, name: str, seed: int, weight: float, *more: object) -> list[str]:
        options = {
            "--model": self.model,
            "--objective": "rewards",
            "--prompts": self.work / "train.jsonl",
            "--reward": "autodeco_fast.demo.records:valid",
            "--rounds": ROUNDS,
            "--prompts-per-round": len(records.TRAIN),
            "--num-generations": GENERATIONS,
            "--max-completion-length": 40,
            "--stop": "\n",
            "--learning-rate": 3e-3,
            "--entropy-weight": weight,
            "--save-steps": 5,
        }
        return self._from(name, seed, *(x for pair in options.items() for x in pair), *more)

    def evaluate(self, part: str, groups: dict[str, list[str]], samples: int) -> list[Path]:
        """Evaluations of groups of policies, one beside the other; the noise is each head seed's
        own."""
        folders = {name: self.work / "evaluations" / f"{part}-{name}" for name in groups}
        commands = [
            command("eval", "--model", self.model, "--prompts", self.work / f"{part}.jsonl")
            + ["--scorer", "json", "--stop", "\n", "--max-new-tokens", "48"]
            + ["--samples", str(samples), "--batch-size", "1024", "--dtype", "float32"]
            + ["--output", str(folders[name]), "--seed", name.partition("seed")[2] or "0"]
            + [word for policy in policies for word in ("--policy", policy)]
            for name, policies in groups.items()
        ]
        together(commands, self.jobs)
        return list(folders.values())

    def of_head(self, name: str, seed: int, more: str = "") -> str:
        return f"head={self.head(name, seed)} {more}".strip()


def tried() -> list[tuple[str, str]]:
    """(head, settings) that one is chosen of: no more than the static grid has."""
    found = [(f"rewards-{b:g}", s) for b in ENTROPY_WEIGHTS for s in SCALES]
    found += [(f"hinge-{g:g}", "") for g in GRAVITIES]
    return found + [(BEGUN, s) for s in SCALES[:3]]


def choose(study: Study) -> list[tuple[str, str]]:
    """(head, settings) that are best on the validation schemas. No fixed setting is chosen: heads
    are compared with the edge of all of them on the test schemas."""
    texts = [study.of_head(name, SEEDS[0], more) for name, more in tried()]
    half = len(texts) // 2
    groups = {"heads-1": texts[:half], "heads-2": texts[half:]}
    folders = study.evaluate("validation", groups, TRIED_SAMPLES)
    heads = frontier.best_at(frontier.read(folders), TARGETS)
    print("best heads on validation:", ", ".join(heads), flush=True)
    named = {f"head={n} {m}".strip(): (n, m) for n, m in tried()}
    # Policies are shown with their Min-P.
    plain = (" ".join(w for w in v.split() if not w.startswith("min_p=")) for v in heads)
    return [named[variant] for variant in plain]


def static_grid() -> list[str]:
    lines = STATIC.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def evaluate_static(study: Study) -> list[Path]:
    """The grid, rules without training and the head that ships on the test schemas; they wait for
    no head."""
    static = static_grid()
    half = len(static) // 2
    groups = {"static-1": static[:half], "static-2": static[half:], "rules": list(RULES)}
    groups |= {"static-more": list(MORE_STATIC), "rules-more": list(MORE_RULES)}
    groups["shipped"] = list(SHIPPED)
    return study.evaluate("test", groups, SAMPLES)


def evaluate_heads(study: Study, wanted: list[tuple[str, str]]) -> list[Path]:
    groups = {
        f"seed{seed}": [study.of_head(name, seed, more) for name, more in wanted] for seed in SEEDS
    }
    return study.evaluate("test", groups, HEAD_SAMPLES)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for heads and evaluations")
    parser.add_argument("--model", help="by default SmolLM2 from its package")
    parser.add_argument("--jobs", type=int, default=1, help="trainings, and evaluations, at once")
    args = parser.parse_args(arguments)
    model = args.model or str(smollm2.folder())
    args.folder.mkdir(parents=True, exist_ok=True)
    study = Study(args.folder, model, jobs=args.jobs)
    with ThreadPoolExecutor(1) as beside:
        static = beside.submit(evaluate_static, study)
        study.train({name for name, _ in tried()}, SEEDS[:1])
        study.train(set(ALWAYS), SEEDS)
        folders = static.result()
    wanted = list(dict.fromkeys([*((name, "") for name in ALWAYS), *choose(study)]))
    study.train({name for name, _ in wanted}, SEEDS)
    folders += evaluate_heads(study, wanted)
    frontier.main([*map(str, folders), "--output", "records"])


if __name__ == "__main__":
    main()
