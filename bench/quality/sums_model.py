"""A small Llama that has learned the sums language, not perfectly, with its tokenizer."""

import random
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autodeco_fast.training.loop import learning_rate
from bench.quality import sums

PAD, LONGEST = "<pad>", 56
STEPS, BATCH, RATE = 1500, 48, 2e-3


def tokenizer() -> PreTrainedTokenizerFast:
    """A token a character; the line's end ends a text."""
    vocabulary = {token: i for i, token in enumerate([PAD, *sums.ALPHABET])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        bos_token=sums.BEGIN,
        eos_token=sums.END,
        clean_up_tokenization_spaces=False,
    )


def model(size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def train(folder: Path, *, seed: int = 0, steps: int = STEPS) -> None:
    """Trains the model and writes it, whole."""
    torch.manual_seed(seed)
    rng, words = random.Random(seed), tokenizer()
    base = model(len(words))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for config in (base.config, base.generation_config):
            setattr(config, name, getattr(words, name))
    optimizer = torch.optim.AdamW(base.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(steps):
        texts = [sums.text(rng) for _ in range(BATCH)]
        batch = words(texts, padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.input_ids == words.pad_token_id, -100)
        loss = base(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
        ).loss
        for group in optimizer.param_groups:
            group["lr"] = RATE * learning_rate(step, steps, warmup_ratio=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.3f} nats a character", flush=True)
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    base.save_pretrained(draft)
    words.save_pretrained(draft)
    draft.rename(folder)
