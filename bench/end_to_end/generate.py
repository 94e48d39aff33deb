"""`generate` with an attached head against static sampling and greedy decoding of the same model:
tokens per second.

    python -m bench.end_to_end.generate

One prompt of 32 tokens, 64 new tokens, a random two-layer Llama with hidden size 896 and V =
151,936, fp32.
"""

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from autodeco_fast import TemperatureHead, attach
from bench.clock import interleave
from bench.machine import device
from bench.records import record

NEW_TOKENS = 64
STATIC = "static T=0.7, Min-P 0.1"


def wide_vocabulary_model() -> LlamaForCausalLM:
    """Random weights; logits have a standard deviation of about 3, as peaked as a small model's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=2432,
        num_hidden_layers=2,
        num_attention_heads=14,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval().to(device())
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.1)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def main() -> None:
    model = wide_vocabulary_model()
    head = TemperatureHead(896)
    torch.nn.init.normal_(head.mlp[2].weight, std=0.5)
    ids = torch.randint(2, 151_936, (1, 32)).to(model.device)
    length = {"max_new_tokens": NEW_TOKENS, "attention_mask": torch.ones_like(ids)}

    def adaptive(fused: bool) -> torch.Tensor:
        with attach(model, head, min_p=0.1, fused=fused):
            return model.generate(ids, **length)

    variants = {
        "adaptive": lambda: adaptive(True),
        "adaptive, fused=False": lambda: adaptive(False),
        STATIC: lambda: model.generate(ids, do_sample=True, temperature=0.7, min_p=0.1, **length),
        "greedy": lambda: model.generate(ids, do_sample=False, **length),
    }
    times = interleave(variants, rounds=20)
    rows = [
        {
            "variant": name,
            "tokens_per_second": NEW_TOKENS / t["seconds"],
            **t,
            "over_static": times[STATIC]["seconds"] / t["seconds"],
        }
        for name, t in times.items()
    ]
    record(
        "generate",
        rows,
        batch=1,
        prompt=32,
        new_tokens=NEW_TOKENS,
        layers=2,
        hidden=896,
        vocab=151_936,
        dtype="float32",
    )


if __name__ == "__main__":
    main()
