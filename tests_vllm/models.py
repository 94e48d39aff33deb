"""Tiny random models that vLLM's CPU kernels take, a family each, and heads for them."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodeco_fast import TemperatureHead, TopPHead

VOCAB, HIDDEN = 128, 64
MIN_P = 0.1
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 8,
}
_OWN = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "decoder_sparse_step": 1, **_EXPERTS},
    "gemma2": {
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "tie_word_embeddings": True,  # all that vLLM has
    },
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 64,
        "sliding_window": 8,
        "rope_parameters": _YARN,
    },
}


def model(family: str) -> PreTrainedModel:
    """A random model in eval mode, fp32, whose next-token distributions are neither flat nor
    one-hot."""
    torch.manual_seed(sum(map(ord, family)))
    config = CONFIG_MAPPING[family](**{**_SHAPE, **_OWN[family]})
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "sinks" in name or "bias" in name:
                parameter.normal_(std=0.02)
        weight = made.get_output_embeddings().weight.normal_(std=0.4)
        if family == "granite":
            weight.mul_(config.logits_scaling)
    return made


def save_model(folder: Path, family: str) -> Path:
    model(family).save_pretrained(folder)
    return folder


def head(
    *, width: int = HIDDEN, offset: float = 0.0, min_p: float | None = MIN_P, seed: int = 0
) -> TemperatureHead:
    """A random head whose temperatures spread over most of (0, 2)."""
    torch.manual_seed(seed)
    made = TemperatureHead(width, offset=offset, min_p=min_p)
    with torch.no_grad():
        made.mlp[2].weight.normal_(std=0.4)
        made.mlp[2].bias.fill_(-0.5)
    return made


def top_p_head(*, seed: int = 1) -> TopPHead:
    """A random second head whose top-p spreads over most of (0, 1)."""
    torch.manual_seed(seed)
    made = TopPHead(HIDDEN)
    with torch.no_grad():
        made.mlp[2].weight.normal_(std=0.4)
        made.mlp[2].bias.fill_(0.0)
    return made


def prompts(count: int, length: int = 6, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count, length), generator=generator).tolist()


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of words, `w5` for id 5, beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)


def token_id(word: str) -> int:
    return int(word.strip().removeprefix("w"))
