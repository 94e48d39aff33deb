"""Objectives and policies on the sums language, from nothing to a record.

    python -m bench.quality.sums_study FOLDER [--jobs N]

trains the model, heads by every objective for some seeds, chooses the settings of every family of
policies on samples for validation, fixed settings and rules too, evaluates them on others and
writes the record and the figure `sums`. What the folder has already is not made again.

A family is held against another by what was chosen of each: the setting that made the fewest errors
among those at least `DIVERSE` on validation. No family has more settings than the fixed ones.
"""

import argparse
import json
import multiprocessing
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from autodeco_fast.files import write_text
from autodeco_fast.policies import parse
from autodeco_fast.training.calibrate import calibrate_from_files
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.evaluate import evaluate
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.run import scan_from_files, train_from_files
from bench.quality import frontier, sums, sums_model

SEEDS, TEXTS, CALIBRATION_TEXTS = (0, 1, 2, 3, 4), 4000, 2000
DIVERSE = 0.97
SAMPLES = {"validation": (600, 120), "test": (2000, 400)}  # texts a policy; of each seed of a head
NOISE = {"validation": 1, "test": 2}  # and twice a head's seed more, so that no two share theirs
GRAVITIES, ENTROPY_WEIGHTS = (0.1, 0.05), (0.02, 0.03, 0.05)
WITH_CUT = (0.03, 0.05)  # β of heads with Min-P 0.1: new ones, and begun as a hinge head of 0.05
ENTROPY = 0.5  # nats a token to hold: what the language has
SCALES = ("", *(f"scale={scale}" for scale in (0.7, 0.85, 1.2, 1.5, 2, 3)))
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
RULES = {
    "top_n_sigma": [f"top_n_sigma n={n} T={T}" for n in (0.7, 1, 1.5, 2, 3, 4) for T in
                    (0.7, 1, 1.5, 2)],
    "p_less": [f"p_less T={T}" for T in (0.7, 1, 1.2, 1.5, 2, 2.5, 3, 4)],
    "min_k": [f"min_k tau={tau} T={T}" for tau in (1.5, 3, 6, 10) for T in (0.7, 1, 1.3, 1.6, 2)],
    "edt": [f"edt t0={t0} theta={theta}" for t0 in (0.7, 1, 1.3, 1.6) for theta in
            (0.03, 0.1, 0.2, 0.3, 0.5, 1)],
    "entropy": [f"entropy a={a} power={power}{cut}" for a in (0.5, 0.7, 1, 1.4, 2, 3) for power in
                (0.5, 1) for cut in ("", " min_p=0.1")],
}  # fmt: skip
JOINT = "autodeco-joint"  # the head that comes with one for top-p


def families() -> dict[str, list[tuple[str, str]]]:
    """Family → (head, settings) that one is chosen of; without a head the settings are a policy."""
    heads = {
        "hinge": [f"hinge-{g:g}" for g in GRAVITIES],
        "hinge-calibrated": [f"hinge-calibrated-{g:g}" for g in GRAVITIES],
        "label_free": [f"label_free-{g:g}" for g in GRAVITIES],
        "autodeco": ["autodeco"],
        JOINT: [JOINT],
        "rewards": [f"rewards-{b:g}" for b in ENTROPY_WEIGHTS],
        "rewards-held": [f"rewards-held-{ENTROPY:g}"],
        "rewards-cut": [f"rewards-cut-{b:g}" for b in WITH_CUT],
        "rewards-from-hinge": [f"rewards-from-hinge-{b:g}" for b in WITH_CUT],
    }
    cuts = {"autodeco": ("", "top_p=0.9", "min_p=0.1"), JOINT: ("", "min_p=0.05", "min_p=0.1")}
    without = {"static": STATIC, **RULES}
    return {family: [("", text) for text in texts] for family, texts in without.items()} | {
        family: [
            (n, f"{c} {s}".strip()) for n in names for c in cuts.get(family, ("",)) for s in SCALES
        ]
        for family, names in heads.items()
    }


class Study:
    """The folder of a study and what is in it."""

    def __init__(self, work: Path, pool: ProcessPoolExecutor):
        self.work, self.pool, self.model = work, pool, work / "model"
        self.prompts = work / "prompts.jsonl"
        self.texts = self._write("texts", count=TEXTS, seed=1)
        write_text(self.prompts, json.dumps({"prompt": sums.BEGIN}) + "\n")  # the only one

    def head(self, name: str, seed: int) -> Path:
        return self.work / "heads" / f"{name}-seed{seed}"

    def _write(self, name: str, *, count: int, seed: int) -> Path:
        """So many texts of the language."""
        path, rng = self.work / f"{name}.jsonl", random.Random(seed)
        lines = (json.dumps({"text": sums.text(rng).rstrip(sums.END)}) for _ in range(count))
        write_text(path, "".join(f"{line}\n" for line in lines))
        return path

    def policy(self, name: str, seed: int, settings: str = "") -> str:
        if not name:
            return settings
        kind = "autodeco" if name == JOINT else "head"
        return f"{kind}={self.head(name, seed)} {settings}".strip()

    def shown(self, chosen: tuple[str, str]) -> str:
        """What a head with settings, or a policy without, is called in a `frontier.Study`."""
        name, settings = chosen
        return frontier.named(str(parse(self.policy(name, SEEDS[0], settings))))

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
            for name, which in (("autodeco", "temperature"), (JOINT, "joint")):
                options = {"objective": f"autodeco_{which}", "min_p": NO_CUT, **online}
                first.append(self._likelihood(name, seed, **options))
            for b in WITH_CUT:
                cut = {"entropy_weight": b, "min_p": 0.1}
                first.append(self._rewards(f"rewards-cut-{b:g}", seed, **cut))
                begun = {"entropy_weight": b, "head": self.head("hinge-0.05", seed)}
                second.append(self._rewards(f"rewards-from-hinge-{b:g}", seed, **begun))
        for some in (first, second):
            list(self.pool.map(train_from_files, some))
        self._calibrate()

    def _calibrate(self) -> None:
        """Hinge heads, each with the offset that keeps their share 1 − λ on texts of its own."""
        texts = self._write("calibration", count=CALIBRATION_TEXTS, seed=3)
        scan = self.work / "calibration"
        scan_from_files(
            ScanConfig(model=str(self.model), data=str(texts), output=scan, all_tokens=True)
        )
        for seed in SEEDS:
            for g in GRAVITIES:
                folder = self.head(f"hinge-calibrated-{g:g}", seed)
                if not folder.is_dir():
                    draft = folder.with_name(f"{folder.name}.draft")
                    shutil.rmtree(draft, ignore_errors=True)
                    shutil.copytree(self.head(f"hinge-{g:g}", seed), draft)
                    calibrate_from_files(draft, scan, alpha=g)
                    draft.rename(folder)

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
        own, and each head seed's."""
        folders = {name: self.work / "evaluations" / f"{part}-{name}" for name in groups}
        configs = [
            EvalConfig(
                model=str(self.model),
                prompts=self.prompts,
                scorer=frontier.SUMS,
                policy=tuple(policies),
                samples=SAMPLES[part]["seed" in name],
                seed=NOISE[part] + 2 * int(name.partition("seed")[2] or 0),
                batch_size=1000,
                max_new_tokens=sums_model.LONGEST,
                output=folders[name],
            )
            for name, policies in groups.items()
        ]
        list(self.pool.map(evaluate, configs))
        return frontier.read(list(folders.values()))

    def choose(self) -> dict[str, tuple[str, str]]:
        """Family → the (head, settings) chosen of it."""
        groups, found = {}, {}
        for family, tried in families().items():
            for seed in SEEDS if tried[0][0] else ("",):
                texts = [self.policy(name, seed, settings) for name, settings in tried]
                groups[f"{family}-seed{seed}" if tried[0][0] else family] = texts
        study = self.evaluate("validation", groups)
        for family, tried in families().items():
            shown = {self.shown(one): one for one in tried}
            best = frontier.best_at({name: study[name] for name in shown}, [DIVERSE])
            if best:
                found[family] = shown[best[0]]
        return found

    def measure(self, chosen: dict[str, tuple[str, str]]) -> tuple[frontier.Study, dict[str, str]]:
        """The samples that count, and family → the policy chosen of it as they name it."""
        heads = {name: "" for tried in families().values() for name, _ in tried if name}
        wanted = dict.fromkeys([*heads.items(), *(one for one in chosen.values() if one[0])])
        rules = [settings for family, (_, settings) in chosen.items() if family in RULES]
        groups = {"static": ["greedy", *STATIC], "rules": rules}
        for seed in SEEDS:
            groups[f"seed{seed}"] = [self.policy(name, seed, settings) for name, settings in wanted]
        study = self.evaluate("test", {name: texts for name, texts in groups.items() if texts})
        return study, {family: self.shown(one) for family, one in chosen.items()}


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
    facts = {f"model_{key}": value for key, value in model.items()}
    frontier.publish(found, "sums", least=0.75, **facts)


if __name__ == "__main__":
    main()
