"""Random models of two layers, one for every way in which logits are made."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from autodeco_fast import TemperatureHead, TopPHead

VOCAB = 96
SHAPE = {
    "vocab_size": VOCAB,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
NEVER = VOCAB  # an end for prompt lookup, which fails without one in transformers 5.0


def _llama():
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, **SHAPE))


def _qwen3():
    return Qwen3ForCausalLM(Qwen3Config(hidden_size=40, **SHAPE))


def _gemma2():
    config = Gemma2Config(
        hidden_size=36, final_logit_softcapping=3.0, query_pre_attn_scalar=8, **SHAPE
    )
    return Gemma2ForCausalLM(config)


def _granite():
    return GraniteForCausalLM(
        GraniteConfig(hidden_size=32, logits_scaling=4.0, embedding_multiplier=3.0, **SHAPE)
    )


def _gpt2():
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=33,
            n_layer=2,
            n_head=3,
            n_positions=256,
            tie_word_embeddings=False,
            **special,
        )
    )
    model.lm_head = torch.nn.Linear(33, VOCAB, bias=True)  # an odd width, and a bias as in Phi
    return model


_MAKERS = {"llama": _llama, "qwen3": _qwen3, "gemma2": _gemma2, "granite": _granite, "gpt2": _gpt2}
NAMES = sorted(_MAKERS)
every_model = pytest.mark.parametrize("name", NAMES)
both_paths = pytest.mark.parametrize("fused", [True, False])


def tiny_model(name: str) -> PreTrainedModel:
    """A random model in eval mode whose next-token distributions are neither flat nor one-hot."""
    torch.manual_seed(sum(map(ord, name)))
    model = _MAKERS[name]().eval()
    with torch.no_grad():
        embedding = model.get_output_embeddings()
        embedding.weight.normal_(std=0.4)
        if getattr(embedding, "bias", None) is not None:
            embedding.bias.normal_()
        if name == "granite":
            embedding.weight.mul_(model.config.logits_scaling)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    return model


def of_one_layer(name: str) -> PreTrainedModel:
    """A tiny model for tests that compile it, whose time is that of tracing its layers."""
    model = tiny_model(name)
    decoder = model.base_model
    del (decoder.h if name == "gpt2" else decoder.layers)[1:]
    model.config.num_hidden_layers = 1
    return model


def tiny_head(model: PreTrainedModel, seed: int = 0) -> TemperatureHead:
    """A random head whose temperatures spread over most of (0, 2)."""
    torch.manual_seed(seed)
    head = TemperatureHead(model.get_output_embeddings().in_features, intermediate_size=16)
    with torch.no_grad():
        head.mlp[2].weight.normal_(std=1.5)
        head.mlp[2].bias.fill_(0.0)
    return head


def tiny_top_p_head(model: PreTrainedModel, *, enhanced: bool = True, seed: int = 1) -> TopPHead:
    """A random second head whose top-p spreads over most of (0, 1)."""
    torch.manual_seed(seed)
    width = model.get_output_embeddings().in_features
    head = TopPHead(width, use_enhanced_features=enhanced, intermediate_size=16)
    with torch.no_grad():
        head.mlp[2].weight.normal_(std=1.5)
        head.mlp[2].bias.fill_(0.0)
    return head


def tokenizer_of_characters() -> PreTrainedTokenizerFast:
    """One of these models' 96 ids for each of as many characters."""
    special = ["<pad>", "<s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *map(chr, range(33, 33 + VOCAB - 3))])}
    raw = Tokenizer(BPE(vocab, []))
    raw.pre_tokenizer, raw.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        padding_side="left",
    )


def prompts(rows: int = 2, length: int = 5, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


@torch.no_grad()
def hidden_and_logits(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the last position, `[B, H]` and `[B, V]`, as the model makes them."""
    seen = []

    def see(_, args):
        seen.append(args[0][:, -1])

    with model.get_output_embeddings().register_forward_pre_hook(see):
        logits = model(input_ids=ids).logits[:, -1]
    return seen[0], logits


@torch.no_grad()
def logits_and_temperature(model, head, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last position's logits `[B, V]` and T `[B]` in fp64, by hand from a plain forward."""
    h, z = (each.double() for each in hidden_and_logits(model, ids))
    first, _, last = head.mlp
    hidden = torch.relu(h @ first.weight.double().T + first.bias.double())
    T = 2 * torch.sigmoid(hidden @ last.weight.double().T + last.bias.double()).squeeze(-1)
    return z, T


def undecided_prompt(model, head) -> torch.Tensor:
    """The prompt `[1, 5]`, of 64, whose kept set at Min-P 0.1 is closest to 12 tokens."""
    ids = prompts(64)
    z, T = logits_and_temperature(model, head, ids)
    kept_set_size = (min_p_distribution(z, T[:, None], 0.1) > 0).sum(-1)
    return ids[(kept_set_size - 12).abs().argmin()][None]


def min_p_distribution(z: torch.Tensor, T: torch.Tensor | float, min_p: float) -> torch.Tensor:
    """softmax(z/T) cut at Min-P and renormalised, fp64."""
    p = (z / T).softmax(-1)
    p = p * (p >= min_p * p.max(-1, keepdim=True).values)
    return p / p.sum(-1, keepdim=True)


def first_tokens(model, ids: torch.Tensor, n: int = 6000, **kwargs) -> torch.Tensor:
    """`n` first tokens after one prompt. [n]"""
    return model.generate(ids, num_return_sequences=n, max_new_tokens=1, **kwargs)[:, -1]
