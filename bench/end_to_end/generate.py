"""`generate` with an attached head against static sampling and greedy decoding of the same model:
tokens per second.

    python -m bench.end_to_end.generate

One prompt of 32 tokens, 64 new tokens, a random two-layer Llama with hidden size 896 and V =
151,936, fp32.
"""

from dataclasses import asdict, dataclass

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from autodeco_fast import TemperatureHead, attach
from bench.clock import in_turn, quantile
from bench.machine import device
from bench.records import options, record

STATIC = "static T=0.7, Min-P 0.1"


@dataclass(frozen=True)
class Size:
    batch: int = 1
    prompt: int = 32
    new_tokens: int = 64
    layers: int = 2
    hidden: int = 896
    vocab: int = 151_936


TINY = Size(prompt=4, new_tokens=3, layers=1, hidden=56, vocab=999)


def wide_vocabulary_model(size: Size) -> LlamaForCausalLM:
    """Random weights; logits have a standard deviation of about 3, as peaked as a small model's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=2432 * size.hidden // 896,
        num_hidden_layers=size.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().to(device())
    with torch.no_grad():
        model.lm_head.weight.normal_(std=3 / size.hidden**0.5)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__).parse_args(arguments)
    size = TINY if args.tiny else Size()
    model = wide_vocabulary_model(size)
    head = TemperatureHead(size.hidden)
    torch.nn.init.normal_(head.mlp[2].weight, std=0.5)
    ids = torch.randint(2, size.vocab, (size.batch, size.prompt)).to(model.device)
    length = {"max_new_tokens": size.new_tokens, "attention_mask": torch.ones_like(ids)}
    static = {"do_sample": True, "temperature": 0.7, "min_p": 0.1}

    def adaptive(fused: bool) -> torch.Tensor:
        with attach(model, head, min_p=0.1, fused=fused):
            return model.generate(ids, **length)

    variants = {
        "adaptive": lambda: adaptive(True),
        "adaptive, fused=False": lambda: adaptive(False),
        STATIC: lambda: model.generate(ids, **static, **length),
        "greedy": lambda: model.generate(ids, do_sample=False, **length),
    }
    times: dict[str, list[float]] = {}
    try:
        in_turn(variants, rounds=2 if args.tiny else 20, wall=True, times=times)
    finally:
        if all(times.get(name) for name in variants):  # interrupted, of fewer rounds
            results = measured(times, size.batch * size.new_tokens)
            record("generate", results, output=args.output, **asdict(size), dtype="float32")


def measured(times: dict[str, list[float]], tokens: int) -> list[dict]:
    """A result a variant, whose calls made so many tokens each."""
    medians = {name: quantile(seconds, 0.5) for name, seconds in times.items()}
    return [
        {
            "variant": name,
            "seconds": seconds,
            "tokens_per_second": tokens / medians[name],
            "over_static": medians[STATIC] / medians[name],
        }
        for name, seconds in times.items()
    ]


if __name__ == "__main__":
    main()
