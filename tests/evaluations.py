"""Small evaluations of a tiny model."""

import json
from pathlib import Path

from rich.console import Console

from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.evaluate import evaluate

POLICIES = ("static T=1 min_p=0.05", "static T=1.5 top_p=0.9", "greedy")
QUIET = Console(quiet=True)


def write_prompts(path: Path, number: int = 5, **fields) -> Path:
    """Prompts of 1 to `number` words."""
    lines = []
    for n in range(number):
        prompt = " ".join(f"w{5 + n + i}" for i in range(n + 1))
        lines.append({"prompt": prompt, "answer": "w9", "task": f"t{n % 2}", **fields})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(folder: Path, model: Path, name: str = "out", **options) -> EvalConfig:
    """Of a run that takes about a second."""
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts)
    options = {
        "scorer": "exact",
        "policy": POLICIES,
        "samples": 3,
        "max_new_tokens": 6,
        "stop": ("w7", "w11 "),
        "dtype": "float32",
        **options,
    }
    return EvalConfig(model=str(model), prompts=prompts, output=folder / name, **options)


def run(folder: Path, model: Path, name: str = "out", **options) -> dict:
    return evaluate(config(folder, model, name, **options), console=QUIET)


def lines_of(output: Path) -> list[bytes]:
    """Those of samples.jsonl, in an order of their own."""
    return sorted((output / "samples.jsonl").read_bytes().splitlines())


def samples_of(output: Path) -> dict[tuple, dict]:
    """(policy, prompt, sample) → the line."""
    read = [json.loads(line) for line in lines_of(output)]
    found = {(s["policy"], s["prompt"], s["sample"]): s for s in read}
    assert len(found) == len(read)
    return found


def without_speeds(results: dict) -> list[dict]:
    """The policies of some results."""
    return [{k: v for k, v in p.items() if k != "tokens_per_second"} for p in results["policies"]]
