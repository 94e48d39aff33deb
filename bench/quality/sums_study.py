"""Objectives and policies on the sums language, from nothing to a record.

    python -m bench.quality.sums_study FOLDER [--jobs N]

trains the model, heads by every objective for some seeds, chooses the settings of every family of
policies on samples for validation, fixed settings too, evaluates them on others and writes the
record and the figure `sums`. What the folder has already is not made again.

A family is held against another by what was chosen of each: the setting that made the fewest errors
among those at least `DIVERSE` on validation. No family has more settings than the fixed ones.
"""

import argparse
import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from autodeco_fast.files import write_text
from autodeco_fast.policies import parse
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.evaluate import evaluate
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.run import scan_from_files, train_from_files
from bench.quality import frontier, sums, sums_model

SEEDS, TEXTS = (0, 1, 2), 4000
DIVERSE = 0.97
VALIDATION, TEST, TEST_OF_SEED = 400, 2000, 700  # texts a policy
GRAVITIES, ENTROPY_WEIGHTS = (0.1, 0.05), (0.02, 0.03, 0.05, 0.08)
FROM_HINGE = 0.03  # β of the heads that begin as a hinge head of gravity 0.05
ENTROPY = 0.5  # nats a token to hold: what the language has
SCALES = ("", "scale=0.7", "scale=0.85", "scale=1.2", "scale=1.5")
NO_CUT = 1e-6  # a head needs a Min-P; this one cuts nothing
ROUNDS = {"rounds": 20, "num_generations": 320, "num_iterations": 4}
STATIC = [
    *(f"static T={T}" for T in (0.3, 0.5, 0.7, 1)),
    *(f"static T={T} min_p=0.1" for T in (0.5, 0.7, 1)),
    *(f"static T={T} min_p={m}" for T, m in ((0.7, 0.05), (1, 0.05), (1, 0.2), (1.5, 0.3))),
    *(f"static T=1 top_p={p}" for p in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
    *(f"static T=0.7 top_p={p}" for p in (0.7, 0.8, 0.9, 0.95)),
    *(f"static T=1.5 top_p={p}" for p in (0.5, 0.6, 0.7)),
]
RULES = [
    *("top_n_sigma n=1", "p_less", "min_k tau=3", "entropy a=0.7"),
    *(f"edt t0=1 theta={theta}" for theta in (0.1, 0.3)),
]


def families() -> dict[str, list[tuple[str, str]]]:
    """Family → (head, settings) that one is chosen of."""
    heads = {
        "hinge": [f"hinge-{g:g}" for g in GRAVITIES],
        "label_free": [f"label_free-{g:g}" for g in GRAVITIES],
        "autodeco": ["autodeco"],
        "rewards": [f"rewards-{b:g}" for b in ENTROPY_WEIGHTS],
        "rewards-held": [f"rewards-held-{ENTROPY:g}"],
        "rewards-from-hinge": [f"rewards-from-hinge-{FROM_HINGE:g}"],
    }
    cuts = {"autodeco": ("", "top_p=0.9", "top_p=0.8")}
    return {
        family: [
            (n, f"{c} {s}".strip()) for n in names for c in cuts.get(family, ("",)) for s in SCALES
        ]
        for family, names in heads.items()
    }


def _texts(part: str, group: str) -> int:
    if part == "validation":
        return VALIDATION
    return TEST_OF_SEED if group.startswith("seed") else TEST


class Study:
    """The folder of a study and what is in it."""

    def __init__(self, work: Path, pool: ProcessPoolExecutor):
        self.work, self.pool, self.model = work, pool, work / "model"
        self.texts, self.prompts = work / "texts.jsonl", work / "prompts.jsonl"
        rng = random.Random(1)
        lines = (json.dumps({"text": sums.text(rng).rstrip(sums.END)}) for _ in range(TEXTS))
        write_text(self.texts, "".join(f"{line}\n" for line in lines))
        write_text(self.prompts, json.dumps({"prompt": sums.BEGIN}) + "\n")  # the only one

    def head(self, name: str, seed: int) -> Path:
        return self.work / "heads" / f"{name}-seed{seed}"

    def policy(self, name: str, seed: int, settings: str = "") -> str:
        return f"head={self.head(name, seed)} {settings}".strip()

    def train(self) -> None:
        """All heads; those that begin as another come after it."""
        scan = self.work / "scan"
        scan_from_files(ScanConfig(model=str(self.model), data=str(self.texts), output=scan))
        first, second = [], []
        for seed in SEEDS:
            for b in ENTROPY_WEIGHTS:
                first.append(self._rewards(f"rewards-{b:g}", seed, entropy_weight=b))
            held = {"entropy_weight": 0.01, "target_entropy": ENTROPY}
            first.append(self._rewards(f"rewards-held-{ENTROPY:g}", seed, **held))
            first += [
                self._likelihood(f"hinge-{g:g}", seed, gravity=g, scan=scan) for g in GRAVITIES
            ]
            online = {"model": str(self.model), "data": self.texts}
            for g in GRAVITIES:
                options = {"objective": "label_free", "gravity": g, **online}
                first.append(self._likelihood(f"label_free-{g:g}", seed, **options))
            options = {"objective": "autodeco_temperature", "min_p": NO_CUT, **online}
            first.append(self._likelihood("autodeco", seed, **options))
            begun = {"entropy_weight": FROM_HINGE, "head": self.head("hinge-0.05", seed)}
            second.append(self._rewards(f"rewards-from-hinge-{FROM_HINGE:g}", seed, **begun))
        for some in (first, second):
            list(self.pool.map(train_from_files, some))

    def _likelihood(self, name: str, seed: int, **options) -> TrainConfig:
        """On texts of the language."""
        if "scan" in options:
            options["num_train_epochs"] = 3
        else:
            options["per_device_train_batch_size"] = 64
        return TrainConfig(output=self.head(name, seed), seed=seed, resume=True, **options)

    def _rewards(self, name: str, seed: int, **options) -> RewardConfig:
        cut = {} if "head" in options else {"min_p": NO_CUT}
        return RewardConfig(
            objective="rewards",
            model=str(self.model),
            prompts=self.prompts,
            reward=frontier.SUMS,
            prompts_per_round=1,
            max_completion_length=sums_model.LONGEST,
            learning_rate=3e-3,
            seed=seed,
            resume=True,
            output=self.head(name, seed),
            **(ROUNDS | cut | options),
        )

    def evaluate(self, part: str, groups: dict[str, list[str]]) -> frontier.Study:
        """The samples of groups of policies, one group beside the other; the noise is the part's
        own."""
        folders = {name: self.work / "evaluations" / f"{part}-{name}" for name in groups}
        configs = [
            EvalConfig(
                model=str(self.model),
                prompts=self.prompts,
                scorer=frontier.SUMS,
                policy=tuple(policies),
                samples=_texts(part, name),
                seed=int(part == "validation"),
                batch_size=1000,
                max_new_tokens=sums_model.LONGEST,
                output=folders[name],
            )
            for name, policies in groups.items()
        ]
        list(self.pool.map(evaluate, configs))
        return frontier.read(list(folders.values()))

    def choose(self) -> dict[str, tuple[str, str]]:
        """Family → the (head, settings) chosen of it, `static` → (its text, "")."""
        groups = {"static": STATIC}
        for family, tried in families().items():
            groups[family] = [self.policy(name, SEEDS[0], settings) for name, settings in tried]
        study = self.evaluate("validation", groups)
        found = {}
        for family, texts in groups.items():
            shown = {frontier.named(str(parse(text))): i for i, text in enumerate(texts)}
            best = frontier.best_at({name: study[name] for name in shown}, [DIVERSE])
            if best:
                which = shown[best[0]]
                found[family] = (
                    (STATIC[which], "") if family == "static" else families()[family][which]
                )
        return found

    def measure(self, chosen: dict[str, tuple[str, str]]) -> tuple[frontier.Study, dict[str, str]]:
        """The samples that count, and family → the policy chosen of it as they name it."""
        heads = {name: "" for tried in families().values() for name, _ in tried}
        wanted = dict.fromkeys([*heads.items(), *(c for f, c in chosen.items() if f != "static")])
        groups = {"static": ["greedy", *STATIC], "rules": RULES}
        for seed in SEEDS:
            groups[f"seed{seed}"] = [self.policy(name, seed, settings) for name, settings in wanted]
        study = self.evaluate("test", groups)
        names = {"static": str(parse(chosen["static"][0]))}
        for family, (name, settings) in chosen.items():
            if family != "static":
                names[family] = frontier.named(str(parse(self.policy(name, SEEDS[0], settings))))
        return study, names


def against(study: frontier.Study, chosen: dict[str, str]) -> list[dict]:
    """A result a policy; those that were chosen say so, and their errors over those of the chosen
    static setting and of AutoDeco's loss."""
    points = {family: frontier.points(study[name]) for family, name in chosen.items()}
    found = {result["variant"]: result for result in frontier.results(study)}
    for family, name in chosen.items():
        found[name]["chosen_of"] = family
        for other in ("static", "autodeco"):
            if other in points and family != other:
                found[name][f"over_{other}"] = frontier.over(points[family], points[other])
    return list(found.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the model, heads and evaluations")
    parser.add_argument("--jobs", type=int, default=1, help="trainings, and evaluations, at once")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "model").is_dir():
        sums_model.train(args.folder / "model")
    model = sums_model.measured(args.folder / "model")
    print(f"model: {model}", flush=True)
    # A forked process would inherit the threads of torch, locked as they are.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        study = Study(args.folder, pool)
        study.train()
        chosen = study.choose()
        print("chosen on validation:", chosen, flush=True)
        found = against(*study.measure(chosen))
    frontier.publish(found, "sums", **{f"model_{key}": value for key, value in model.items()})


if __name__ == "__main__":
    main()
