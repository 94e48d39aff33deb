"""`generate` with an attached head against static sampling and greedy decoding of the same model: tokens per second.

One prompt of 32 tokens, 64 new tokens, a random two-layer Llama with hidden size 896 and V = 151,936, fp32.
"""

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from autodeco_fast import TemperatureHead, attach
from bench.harness import interleave, record

NEW_TOKENS = 64


def tiny_deep_vocabulary() -> LlamaForCausalLM:
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
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.1)  # logits of standard deviation 3
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def main() -> None:
    model = tiny_deep_vocabulary()
    head = TemperatureHead(896)
    head.load_state_dict({k: v for k, v in head.state_dict().items()})
    torch.nn.init.normal_(head.mlp[2].weight, std=0.5)
    ids = torch.randint(2, 151_936, (1, 32))
    length = {"max_new_tokens": NEW_TOKENS}

    def adaptive(fused: bool) -> torch.Tensor:
        with attach(model, head, min_p=0.1, fused=fused):
            return model.generate(ids, **length)

    variants = {
        "adaptive": lambda: adaptive(True),
        "adaptive, scaling only": lambda: adaptive(False),
        "static T=0.7, Min-P 0.1": lambda: model.generate(ids, do_sample=True, temperature=0.7, min_p=0.1, **length),
        "greedy": lambda: model.generate(ids, do_sample=False, **length),
    }
    record("generate", interleave(variants, samples=20))


if __name__ == "__main__":
    main()
