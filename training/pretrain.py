"""Trains the embedded language model on the standard library's source text.

    python -m autodeco_fast.training.pretrain --output DIR --steps 1000 --seed 0

A byte-level BPE tokenizer of 8192 tokens, then a Llama of 5 layers and width 256 (tied embeddings),
on random windows of the `train` split of `stdlib_corpus`. fp32 master weights, bf16 products, Muon
for the matrices and AdamW for the rest, linear warm-up and decay. Ends with the held-out loss
beside a unigram and an interpolated trigram model of the same tokens, written into the model's
card.
"""

import argparse
import json
import math
import os
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autodeco_fast.training.stdlib_corpus import read_split

VOCAB, WINDOW, BATCH, WARMUP = 8192, 512, 8, 60
END = "<|endoftext|>"
_WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[\r\n]+ *|\s+"


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which a line break and the indentation after it can be one token; id 0 ends
    a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All documents in one row of ids, each opened by the end-of-text token."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.append(0)
        ids.extend(encoding.ids)
    return np.array(ids, dtype=np.int64)


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, ids: np.ndarray, steps: int, seed: int) -> None:
    """`steps` updates of BATCH windows of WINDOW tokens, in place."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda s: min((s + 1) / WARMUP, max(0.0, 1 - s / steps))
        )
        for o in optimizers
    ]
    rng = np.random.default_rng(seed)
    rows = np.arange(WINDOW + 1)
    started, running = time.time(), 0.0
    model.train()
    for step in range(steps):
        starts = rng.integers(0, len(ids) - WINDOW - 1, BATCH)
        batch = torch.from_numpy(ids[starts[:, None] + rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0:
            speed = (step + 1) * BATCH * WINDOW / (time.time() - started)
            print(f"step {step}/{steps}  loss {running:.3f}  {speed:.0f} tokens/s", flush=True)
    model.eval()


@torch.inference_mode()
def held_out_nats(model: LlamaForCausalLM, ids: np.ndarray) -> float:
    """Mean negative log-likelihood in nats a token over consecutive windows, the first token of
    each given."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, WINDOW):
        batch = torch.from_numpy(ids[start : start + WINDOW + 1])[None]
        logits = model(input_ids=batch[:, :-1]).logits.float()
        total += torch.nn.functional.cross_entropy(logits[0], batch[0, 1:], reduction="sum").item()
        count += batch.shape[1] - 1
    return total / count


def ngram_nats(train_ids: np.ndarray, ids: np.ndarray) -> dict[str, float]:
    """Held-out nats a token of a unigram (add-one) and of a trigram interpolated with it (absolute
    discount 0.75)."""
    discount = 0.75

    def backed_off(order: int, lower: np.ndarray) -> np.ndarray:
        """p_order(next | order-1 tokens before) at every position of `ids` from `order - 1` on."""

        def key(x):
            return sum(
                x[k : len(x) - order + 1 + k] * VOCAB ** (order - 1 - k) for k in range(order)
            )

        grams, counts = np.unique(key(train_ids), return_counts=True)
        contexts, first, types = np.unique(grams // VOCAB, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first)

        def find(table: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
            at = np.searchsorted(table, wanted).clip(max=len(table) - 1)
            return np.where(table[at] == wanted, values[at], 0)

        gram = key(ids)
        n, total, kinds = (
            find(grams, counts, gram),
            find(contexts, totals, gram // VOCAB),
            find(contexts, types, gram // VOCAB),
        )
        seen = np.maximum(total, 1)
        return np.where(
            total > 0, np.maximum(n - discount, 0) / seen + discount * kinds / seen * lower, lower
        )

    frequency = np.bincount(train_ids, minlength=VOCAB) + 1.0
    unigram = (frequency / frequency.sum())[ids]
    bigram = backed_off(2, unigram[1:])
    trigram = backed_off(3, bigram[1:])
    return {
        "unigram": float(-np.log(unigram[1:]).mean()),
        "trigram": float(-np.log(trigram).mean()),
    }


CARD = """---
license: other
---
# The embedded model

A language model of Python source text, small enough to ship with a package: Llama architecture,
{parameters:,} parameters, byte-level BPE of
{vocab} tokens, bf16. Made by

    python -m autodeco_fast.training.pretrain --output DIR --steps {steps} --seed {seed}

on the source text of Python {python}'s standard library (the `train` list of `stdlib_corpus.py`:
{train_tokens:,} tokens, {seen_tokens:,} seen in training). That text is under the Python Software
Foundation License. For demonstrations and tests only.

Held-out modules ({held_out_tokens:,} tokens, {held_out_bytes:,} bytes; never seen in training):

| model | nats a token | nats a byte |
|---|---|---|
| unigram (add-one) | {unigram:.3f} | {unigram_byte:.3f} |
| trigram (absolute discount, interpolated) | {trigram:.3f} | {trigram_byte:.3f} |
| this model | {model:.3f} | {model_byte:.3f} |

The model's windows are {window} tokens with no context carried over.
"""


def write_model(
    output: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict
) -> None:
    """Writes the folder under a temporary name, then puts it in place."""
    draft = output.with_name(output.name + f".tmp{os.getpid()}")
    model.to(torch.bfloat16).save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / "README.md").write_text(CARD.format(**facts))
    (draft / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    if output.exists():
        shutil.rmtree(output)
    draft.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts = [text for _, text in read_split("train")]
    held_out = [text for _, text in read_split("held_out")]
    tokenizer = build_tokenizer(texts)
    ids, held_ids = encode(tokenizer, texts), encode(tokenizer, held_out)
    held_bytes = sum(len(text.encode()) for text in held_out)
    model = build_model(args.seed)
    print(
        f"{model.num_parameters():,} parameters, {len(ids):,} training tokens, {len(held_ids):,} "
        "held out",
        flush=True,
    )
    train(model, ids, args.steps, args.seed)

    nats = {**ngram_nats(ids, held_ids), "model": held_out_nats(model, held_ids)}
    facts = {
        "steps": args.steps,
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "vocab": VOCAB,
        "window": WINDOW,
        "python": platform.python_version(),
        "train_tokens": len(ids),
        "seen_tokens": args.steps * BATCH * WINDOW,
        "held_out_tokens": len(held_ids),
        "held_out_bytes": held_bytes,
        **nats,
        **{f"{name}_byte": value * len(held_ids) / held_bytes for name, value in nats.items()},
    }
    assert all(math.isfinite(v) for v in nats.values())
    write_model(args.output, model, tokenizer, facts)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
