"""Objectives and policies on the sums language, from nothing to a record.

    python -m bench.quality.sums_study FOLDER

trains the model, heads by every objective for three seeds, evaluates them beside a grid of static
settings, and writes the record and the figure `sums`. What the folder has already is not made
again.
"""

import argparse
import json
import random
from pathlib import Path

from autodeco_fast.checkpoint import CONFIG_NAME
from autodeco_fast.files import write_text
from autodeco_fast.training.config import ScanConfig, TrainConfig
from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.evaluate import evaluate
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.run import scan_from_files, train_from_files
from bench.quality import frontier, sums, sums_model

SEEDS, TEXTS, SAMPLES = (0, 1, 2), 4000, 1000
GRAVITIES, ENTROPY_WEIGHTS = (0.1, 0.05), (0.02,)
NO_CUT = 1e-6  # a head needs a Min-P; this one cuts nothing
STATIC = [
    *(f"static T={T}" for T in (0.3, 0.5, 0.7, 1)),
    *(f"static T={T} min_p=0.1" for T in (0.5, 0.7, 1)),
    *(f"static T={T} min_p={m}" for T, m in ((0.7, 0.05), (1, 0.05), (1, 0.2), (1.5, 0.3))),
    *(f"static T=1 top_p={p}" for p in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
    *(f"static T=0.7 top_p={p}" for p in (0.7, 0.8, 0.9, 0.95)),
    *(f"static T=1.5 top_p={p}" for p in (0.5, 0.7)),
]
RULES = ["top_n_sigma n=1", "p_less"]


def _finished(folder: Path) -> bool:
    return (folder / CONFIG_NAME).exists()


def _data(work: Path) -> tuple[Path, Path]:
    """Texts to learn from, and the one prompt: the sign that begins a text."""
    rng = random.Random(1)
    texts, prompts = work / "texts.jsonl", work / "prompts.jsonl"
    lines = (json.dumps({"text": sums.text(rng).rstrip(sums.END)}) + "\n" for _ in range(TEXTS))
    write_text(texts, "".join(lines))
    write_text(prompts, json.dumps({"prompt": sums.BEGIN}) + "\n")
    return texts, prompts


def _heads(work: Path, model: str, texts: Path, prompts: Path) -> list[Path]:
    scan = work / "scan"
    scan_from_files(ScanConfig(model=model, data=str(texts), output=scan))
    runs: dict[str, TrainConfig | RewardConfig] = {}
    online = {"model": model, "data": texts, "per_device_train_batch_size": 64}
    for seed in SEEDS:
        for gravity in GRAVITIES:
            name = f"hinge-{gravity:g}-seed{seed}"
            runs[name] = TrainConfig(
                scan=scan, gravity=gravity, num_train_epochs=3, seed=seed, output=work / name
            )
        name = f"label_free-0.1-seed{seed}"
        runs[name] = TrainConfig(objective="label_free", seed=seed, output=work / name, **online)
        name = f"autodeco-seed{seed}"
        runs[name] = TrainConfig(
            objective="autodeco_temperature", seed=seed, output=work / name, min_p=NO_CUT, **online
        )
        for weight in ENTROPY_WEIGHTS:
            name = f"rewards-{weight:g}-seed{seed}"
            runs[name] = RewardConfig(
                objective="rewards",
                model=model,
                prompts=prompts,
                reward=frontier.SUMS,
                rounds=80,
                prompts_per_round=1,
                num_generations=400,
                max_completion_length=sums_model.LONGEST,
                min_p=NO_CUT,
                entropy_weight=weight,
                learning_rate=3e-3,
                seed=seed,
                output=work / name,
            )
    for config in runs.values():
        if not _finished(config.output):
            train_from_files(config)
    return [config.output for config in runs.values()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the model, heads and evaluations")
    work = parser.parse_args(arguments).folder
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model").is_dir():
        sums_model.train(work / "model")
    texts, prompts = _data(work)
    heads = _heads(work, str(work / "model"), texts, prompts)
    evaluate(
        EvalConfig(
            model=str(work / "model"),
            prompts=prompts,
            scorer=frontier.SUMS,
            policy=(*STATIC, *RULES, *(f"head={head}" for head in heads)),
            samples=SAMPLES,
            batch_size=SAMPLES,
            max_new_tokens=sums_model.LONGEST,
            output=work / "evaluation",
        )
    )
    frontier.main([str(work / "evaluation"), "--output", "sums"])


if __name__ == "__main__":
    main()
