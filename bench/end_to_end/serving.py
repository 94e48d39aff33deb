"""Time per new token of a served model, with the head and as vLLM is without this library, at 1, 8
and 32 requests at a time.

    python -m bench.end_to_end.serving

SmolLM2 where it is installed, and a random two-layer Llama with V = 151,936, in bf16 on a GPU and
in fp32 on a CPU; prompts of 32 tokens, 64 new tokens each. What is timed is the call, its prompts
included, and divided by its new tokens. Both ways take turns in one engine, in alternating order,
and switching between them is not timed: off, the model computes logits by itself and the batch has
none of our processors. Needs vLLM in the environment.
"""

import functools
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from autodeco_fast import TemperatureHead
from autodeco_fast.demo import smollm2
from bench.clock import in_turn, quantile
from bench.end_to_end.generate import Size, wide_vocabulary_model
from bench.machine import product_dtypes
from bench.records import Recording, options

HEAD, MIN_P, PLAIN = "with the head", "vLLM, T = 1, Min-P 0.1", "vLLM, T = 1"
CONCURRENCY, PROMPT, NEW_TOKENS, ROUNDS = (1, 8, 32), 32, 64, 20


def _random_head(folder: Path, width: int) -> Path:
    torch.manual_seed(0)
    head = TemperatureHead(width, min_p=0.1)
    torch.nn.init.normal_(head.mlp[2].weight, std=0.5)
    head.save_pretrained(folder)
    return folder


def _models(folder: Path, *, tiny: bool) -> Iterator[tuple[str, Path, Path]]:
    """Name, folder and head's folder of each."""
    if smollm2.available() and not tiny:
        model = smollm2.folder()
        width = AutoConfig.from_pretrained(model).hidden_size
        yield smollm2.NAME, model, _random_head(folder / "smollm2-head", width)
    size = Size(layers=1, vocab=999) if tiny else Size()
    wide_vocabulary_model(size).bfloat16().save_pretrained(folder / "wide")
    yield f"V = {size.vocab}", folder / "wide", _random_head(folder / "head", size.hidden)


def _switch(worker: Any, on: bool) -> None:
    """Puts the head on a worker's model, or takes it and its processors away."""
    from autodeco_fast.serving.vllm_requests import Cut, Requests

    runner = worker.model_runner
    model = runner.get_model()
    if "compute_logits" in vars(model):
        runner._bench_adaptive = model.compute_logits
        del model.compute_logits  # the class has vLLM's own
    if on:
        model.compute_logits = runner._bench_adaptive
    if hasattr(runner, "input_batch"):
        every = runner.input_batch.logitsprocs
        lists = [every.non_argmax_invariant, every.argmax_invariant]
    else:
        lists = [runner.sampler.logits_processors]
    ours = [[each for each in some if type(each) in (Requests, Cut)] for some in lists]
    if any(ours):
        runner._bench_ours = ours
    for some, here, kept in zip(lists, ours, runner._bench_ours):
        for each in here:
            some.remove(each)
        some.extend(kept if on else [])


def _run(llm: Any, prompts: list[dict], **settings: Any) -> None:
    from vllm import SamplingParams

    params = SamplingParams(ignore_eos=True, **settings)
    llm.generate(prompts, params, use_tqdm=False)


def _measure(model: Path, head: Path, name: str, *, tiny: bool) -> list[dict]:
    from vllm import LLM

    llm = LLM(
        str(model),
        dtype=product_dtypes()[0],
        additional_config={"autodeco_head": str(head)},
        generation_config="vllm",
        skip_tokenizer_init=True,
        max_model_len=128,
        max_num_seqs=32,
        enable_prefix_caching=False,
        enforce_eager=tiny,
    )
    vocabulary = llm.model_config.get_vocab_size()
    new_tokens, results = 3 if tiny else NEW_TOKENS, []
    for concurrency in (1, 2) if tiny else CONCURRENCY:
        ids = torch.randint(2, vocabulary, (concurrency, PROMPT)).tolist()
        run = functools.partial(
            _run, llm, [{"prompt_token_ids": each} for each in ids], max_tokens=new_tokens
        )
        variants = {
            HEAD: run,
            MIN_P: functools.partial(run, min_p=0.1),
            PLAIN: run,
        }
        times = in_turn(
            variants,
            rounds=2 if tiny else ROUNDS,
            before=lambda variant: llm.collective_rpc(_switch, args=(variant == HEAD,)),
            alternate=True,
            wall=True,
        )
        plain = quantile(times[MIN_P], 0.5)
        results += [
            {
                "variant": variant,
                "group": f"serving, {name}, {concurrency} at a time",
                "seconds": taken,
                "seconds_per_new_token": quantile(taken, 0.5) / new_tokens,
                "over_min_p": quantile(taken, 0.5) / plain,
                "model": name,
                "concurrency": concurrency,
            }
            for variant, taken in times.items()
        ]
    return results


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__).parse_args(arguments)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the clock is this process's
    recording = Recording("serving", output=args.output)
    facts = {"prompt": PROMPT, "new_tokens": NEW_TOKENS, "dtype": product_dtypes()[0]}
    with tempfile.TemporaryDirectory() as folder:
        for name, model, head in _models(Path(folder), tiny=args.tiny):
            # An engine's memory is free once its process has ended.
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                taken = process.submit(_measure, model, head, name, tiny=args.tiny).result()
            recording.add(taken, **facts)


if __name__ == "__main__":
    main()
