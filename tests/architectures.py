"""A tiny random model of every causal architecture that transformers knows."""

import inspect

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from autodeco_fast import TemperatureHead

VOCAB = 96

# What makes a model tiny: a value goes wherever a configuration has one of the names.
TINY = {
    name: value
    for names, value in {
        "vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab": VOCAB,
        "hidden_size n_embd d_model hidden_size_global mm_embed_dim output_proj_dims": 32,
        "adapter_in_dim adapter_out_dim adapter_input_size": 32,
        "embedding_size word_embed_proj_dim input_embedding_size output_embedding_size": 24,
        "intermediate_size moe_intermediate_size": 48,
        "shared_expert_intermediate_size shared_intermediate_size": 48,
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size n_inner d_inner dff dim_ff": 48,
        "ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim feed_forward_size": 48,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth": 4,
        "num_attention_heads num_key_value_heads n_head n_heads num_heads": 4,
        "encoder_attention_heads decoder_attention_heads": 4,
        "swa_num_attention_heads swa_num_key_value_heads": 4,
        "linear_num_heads linear_num_key_heads linear_num_value_heads": 4,
        "mamba_n_heads n_mamba_heads mamba_num_heads": 4,
        "head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim attention_head_size": 8,
        "index_head_dim dim_head swa_head_dim linear_head_dim": 8,
        "linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input": 8,
        "mamba_d_state mamba_head_dim state_size ssm_state_size mamba_chunk_size chunk_size": 8,
        "rotary_dim num_experts num_local_experts n_routed_experts moe_num_experts": 4,
        "q_lora_rank kv_lora_rank o_lora_rank": 16,
        "num_experts_per_tok moe_topk": 2,
        "n_group n_groups topk_group n_shared_experts o_groups": 1,
        "num_kv_shared_layers zero_expert_num": 0,
        "max_position_embeddings n_positions": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "is_decoder": True,
        "use_mamba_kernels": False,
        # Smaller, and h would be the last token's embedding.
        "initializer_range init_std embed_init_std axial_norm_std": 0.2,
        # What stands around the output embedding, strong enough to be seen.
        "tie_word_embeddings": False,
        "final_logit_softcapping logits_soft_cap output_logit_soft_cap": 3.0,
        "logits_scaling logits_mup_width_multiplier": 4.0,
        "logit_scale lm_head_multiplier": 0.25,
        "dim_model_base": 8,
        "unpadded_vocab_size": 90,
    }.items()
    for name in names.split()
}

_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_DOTS3 = {
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_DOTS3 |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
}

# What an architecture needs besides; inner dictionaries are for configurations inside others.
SPECIAL: dict[str, dict] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"num_hidden_layers": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _MROPE, "sliding_attention": _MROPE}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "dots3_note": {"text_config": _DOTS3, "vision_config": {"mlp_layer_types": ["dense"] * 4}},
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"num_key_value_heads": 2, "head_dim": 12},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "attn_layers": ["local"] * 2,
        "axial_pos_shape": (16, 16),
        "axial_pos_embds_dim": (16, 16),
    },
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "xlm": {"mask_token_id": 5},  # 0, the default, is padding here
    "xlstm": {"hidden_size": 128, "chunk_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "use_mem_rope": True},
    "zaya": {"num_experts_per_tok": 1},
}

# What `AutoModelForCausalLM` makes no model of that continues ids: why, and words of the error.
_DRAFTER = (
    "a drafter: it reads the keys and values of the model it drafts for",
    "hidden_size_per_layer_input|producing a cache|shared_kv_states",
)
_MUSIC = "the mapped class takes the decoder's configuration, not this one"
CANNOT = {
    "gemma3n": ("its vision part needs timm; the text model is gemma3n_text", "timm"),
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "musicgen": (_MUSIC, "no attribute|missing"),
    "musicgen_melody": (_MUSIC, "no attribute|missing"),
}

if transformers.__version__.startswith("5.0."):
    CANNOT |= {
        "emu3": ("the mapped class takes the text configuration, not this one", "no attribute"),
        "llama4": ("the mapped class takes the text configuration, not this one", "no attribute"),
    }

# What `attach` refuses: why, and words of the error.
UNATTACHED = {
    "prophetnet": ("h is of several streams, the logits of one", "which h decides is not known")
}

# What `generate` needs for its step to be the whole forward: attached or not, the cached step of
# these is another one. (That of Nemotron-H and Zamba2 leaves out a clamp of the time steps; Doge's
# is right in later versions.)
UNCACHED: dict[str, dict] = {
    name: {"use_cache": False} for name in "blt cpmant doge nemotron_h rwkv zamba2".split()
}
UNCACHED["xlnet"] = {"use_mems": False}


def _positions_from_zero(model: PreTrainedModel, ids: torch.Tensor) -> dict:
    return {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}


def _prepared(model: PreTrainedModel, ids: torch.Tensor) -> dict:
    return model.prepare_inputs_for_generation(ids)


# Where `generate` does not feed a model the plain ids.
_ROBERTA = ["camembert", "data2vec-text", "roberta", "roberta-prelayernorm"]
_ROBERTA += ["xlm-roberta", "xlm-roberta-xl", "xmod"]
FED = {
    # By themselves they count from pad_token_id + 1.
    **dict.fromkeys(_ROBERTA, _positions_from_zero),
    **dict.fromkeys(["xlm", "xlnet"], _prepared),  # a token at the end that stands for the next one
}

# What training may refuse. Anything else it must take; and whatever it takes it must read rightly.
_BERT = ["bert", "big_bird", "electra", "ernie", "megatron-bert", "modernbert-decoder"]
_BERT += ["rembert", "roc_bert", "roformer"]
UNTRAINED = {
    **dict.fromkeys([*_BERT, *_ROBERTA], "layers of the LM head stand before the output embedding"),
    **dict.fromkeys(
        ["hyperclovax", "inkling2_text", "inkling_text", "xlstm"],
        "a transform under a name of its own",
    ),
    "recurrent_gemma": "a transform under a name of its own",
    **dict.fromkeys(
        ["gemma3", "mpt"], "the configuration names a transform that the model does not apply"
    ),
    "minicpm3": "h is divided before the output embedding",
    **dict.fromkeys(
        ["fuyu", "llama4", "llama4_text", "mllama"], "what `base_model` gives has logits"
    ),
    **dict.fromkeys(
        ["cpmant", "doge", "xlm", "xlnet"], "not causal: in a whole row, h has seen what follows"
    ),
}

NAMES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(CANNOT) - set(UNATTACHED))
LEFT_OUT = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CANNOT))


def _tiny_config(cls: type[PreTrainedConfig], special: dict) -> PreTrainedConfig:
    known = {*inspect.signature(cls.__init__).parameters, *cls.attribute_map, *special}
    if "vocab_size" in known:
        known.add("pad_token_id")  # which some take without a parameter of that name
    values = {name: value for name, value in (TINY | special).items() if name in known}
    for inner, inner_cls in cls.sub_configs.items():
        if inner_cls is AutoConfig:
            inner_cls = type(getattr(cls(), inner))
        if issubclass(inner_cls, PreTrainedConfig):
            values[inner] = _tiny_config(inner_cls, special.get(inner, {})).to_diff_dict()
    return cls(**values)


def build(name: str) -> PreTrainedModel:
    """In eval mode, its output embedding tied to nothing.

    Next-token distributions are neither flat nor one-hot.
    """
    torch.manual_seed(0)
    config = _tiny_config(CONFIG_MAPPING[name], SPECIAL.get(name, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1)
    embedding = model.get_output_embeddings()
    embedding.weight = torch.nn.Parameter(torch.randn_like(embedding.weight))
    for _ in range(3):  # once is enough where logits are linear
        _, z = seen(model, prompts())
        with torch.no_grad():
            embedding.weight.mul_(1.5 / z.std())
    return model


def prompts(rows: int = 8, length: int = 5) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def seen(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the output embedding in a whole forward of `ids [B, L]`, and the logits.

    `[B, L, H]`, `[B, L, V]`.
    """
    caught = []

    def catch(_, args, kwargs):
        caught.append(args[0] if args else next(iter(kwargs.values())))

    fed = FED.get(model.config.model_type)
    with model.get_output_embeddings().register_forward_pre_hook(catch, with_kwargs=True):
        z = model(**(fed(model, ids) if fed else {"input_ids": ids})).logits
    h = caught[-1]
    return h, z


def spread_head(model: PreTrainedModel) -> TemperatureHead:
    """A random head whose temperatures on the model's hidden states spread over most of (0, 2)."""
    h = torch.cat([seen(model, prompts(length=length))[0][:, -1] for length in (5, 6, 8)])
    torch.manual_seed(1)
    head = TemperatureHead(h.shape[-1], intermediate_size=16)
    first, _, last = head.mlp
    with torch.no_grad():
        first.weight.div_(h.std())
        last.weight.normal_()
        u = head.mlp(h)
        last.weight.mul_(1.5 / u.std())
        last.bias.copy_(-1.5 * u.mean() / u.std())
    return head
