"""Every policy on every schema, as often as there are seeds; a line a policy, schema and seed.

    python -m bench.quality.study --model FOLDER --policies FILE --part test --output FILE.jsonl

The file of policies has one a line, in the words of `autodeco_fast.policies.parse`; `{seed}` in a
line stands for the seed. Lines that are in the output already are not run again.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from autodeco_fast import policies
from autodeco_fast.files import append_text
from autodeco_fast.training.base_model import load, load_tokenizer
from bench.quality import schemas
from bench.quality.records import SAMPLES, Writer, entropies

PARTS = {"validation": schemas.VALIDATION, "test": schemas.TEST}


def done(path: Path) -> set[tuple]:
    """What the output has."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {(r["policy"], r["schema"], r["seed"]) for r in map(json.loads, lines)}


def measure(writer: Writer, text: str, schema: schemas.Schema, seed: int, samples: int) -> dict:
    """One line of the output."""
    started = time.perf_counter()
    policy = policies.parse(text.replace("{seed}", str(seed)))
    written = writer.write(schema, policy, seed=seed, samples=samples)
    return {
        "policy": text,
        "schema": schema.name,
        "seed": seed,
        "valid": written.share,
        "distinct": written.distinct,
        "entropy": entropies(written.records, schema.fields),
        "temperature": written.temperature,
        "tokens": written.tokens,
        "seconds": time.perf_counter() - started,
        "texts": written.texts,
        "is_valid": written.valid,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--policies", type=Path, required=True, help="a policy a line")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--seeds", default="0", help="like 0,1,2")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    lines = args.policies.read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if line.strip() and not line.startswith("#")]
    seen = done(args.output)
    writer = Writer(load(args.model, torch.float32), load_tokenizer(args.model))
    for seed in map(int, args.seeds.split(",")):
        for text in texts:
            for schema in PARTS[args.part]:
                if (text, schema.name, seed) in seen:
                    continue
                line = measure(writer, text, schema, seed, args.samples)
                append_text(args.output, json.dumps(line, ensure_ascii=False) + "\n")
                print(f"{text}  {schema.name}  valid {line['valid']:.3f}", flush=True)


if __name__ == "__main__":
    main()
