"""`AutoDecoModelForCausalLM`: a frozen base model with AutoDeco's two heads.

    h        what enters the base's output embedding
    z        the base's logits, as it makes them
    T        temp_head(h)
    top-p    top_p_head([h, T, prob_stats(z, T)])

One forward runs the base once, its LM head included, and keeps no hidden states but h.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from autodeco_fast.autodeco import loading, saving
from autodeco_fast.autodeco.config import AutoDecoConfig
from autodeco_fast.autodeco.layout import MODEL_TYPE
from autodeco_fast.autodeco.losses import heads_losses
from autodeco_fast.causal_lm import embedding_width
from autodeco_fast.generation import Attachment, attach
from autodeco_fast.heads import TemperatureHead, TopPHead
from autodeco_fast.policies import AutoDecoPolicy
from autodeco_fast.policies.autodeco import predicted_top_p
from autodeco_fast.policies.temperature import predicted
from autodeco_fast.values import require

_ATTACHING = threading.Lock()


@dataclass
class AutoDecoOutput(ModelOutput):
    """What a forward returns, under the released names.

    `temp_logits` and `top_p_logits` are T and top-p themselves, `[B, L, 1]` fp32; None of a head
    that is not used. `loss` is the sum of the losses there are.
    """

    loss: torch.Tensor | None = None
    temp_loss: torch.Tensor | None = None
    top_p_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    temp_logits: torch.Tensor | None = None
    top_p_logits: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


class AutoDecoModelForCausalLM(PreTrainedModel, GenerationMixin):
    """A base model, `llm`, with a `temp_head` and a `top_p_head`; None is one that is not used.

    The base is frozen and stays in eval mode whatever `train()` says: the heads alone learn.

    Args:
        config: of the whole.
        llm: the base model; made of the configuration, with random weights, if None.

    Raises:
        ValueError: if the configuration uses no head, or is of another width than the base.
    """

    config_class = AutoDecoConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # a mean over its own tokens: Trainer divides for accumulation
    # Attention is the base's own affair.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: AutoDecoConfig, llm: PreTrainedModel | None = None):
        attention = config._attn_implementation  # before the next line fills it in
        super().__init__(config)
        used = config.enable_temperature_head, config.enable_top_p_head
        require(any(used), "enable_temperature_head, enable_top_p_head", used, "true, one of them")
        if llm is None:
            options = {"attn_implementation": attention} if attention else {}
            dtype = torch.get_default_dtype()  # that of `from_config`, which made us
            llm = AutoModelForCausalLM.from_config(config.base_config(), dtype=dtype, **options)
        width = embedding_width(llm)
        expected = config.temperature_hidden_size, config.top_p_hidden_size
        if expected != (width, width):
            raise ValueError(
                f"temperature_hidden_size, top_p_hidden_size must be {width} both, the width of "
                f"what enters the output embedding of {type(llm).__name__}, got {expected}"
            )
        self.llm = llm.requires_grad_(False)
        config._attn_implementation = llm.config._attn_implementation
        # fp32 whatever dtype transformers makes modules in meanwhile
        enhanced = config.use_enhanced_features
        self.temp_head = TemperatureHead(width).float() if used[0] else None
        self.top_p_head = TopPHead(width, enhanced).float() if used[1] else None
        self._attachment: Attachment | None = None
        self._dequantized = False  # see `loading.Loaded`
        self.post_init()
        self.train(self.training)

    def init_weights(self) -> None:
        """Does nothing: base and heads have made or read their weights, which transformers would
        not know."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: PreTrainedConfig | None = None,
        base_model: str | os.PathLike | None = None,
        heads_dtype: torch.dtype = torch.float32,
        output_loading_info: bool = False,
        **options,
    ):
        """Reads a checkpoint in the released format, heads alone or with its base model.

        Args:
            pretrained_model_name_or_path: a folder, or an id on the hub.
            config: of the checkpoint, of which `enable_temperature_head` and `enable_top_p_head`
                are looked at; they may be given as options, too.
            base_model: folder or hub id of the base model, in place of the one that a heads-only
                checkpoint names.
            heads_dtype: of the heads' weights, whatever the base's.
            output_loading_info: whether to return `(model, info)`, as the Auto classes take it.
            options: what `AutoModelForCausalLM.from_pretrained` takes, for the base model: dtype,
                device_map, attn_implementation, quantization_config, trust_remote_code, …;
                `revision` is the checkpoint's.

        Raises:
            ValueError: in one line, for a checkpoint that is none or does not fit its base model,
                files that are broken, missing or outside the folder, and whatever keeps the base
                model from being loaded.
        """
        name = pretrained_model_name_or_path
        loaded = loading.load(name, config, base_model, options)
        model = cls(loaded.config, llm=loaded.llm)
        model._dequantized = loaded.dequantized
        model.temp_head, model.top_p_head = loaded.heads.temperature, loaded.heads.top_p
        device = loading.heads_device(loaded.llm)
        for head in model._heads():
            head.to(device=device, dtype=heads_dtype)
        spread = loading.device_map(model.llm, device)
        if spread is not None:
            model.hf_device_map = spread
        model.eval()
        info = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *,
        heads_only: bool = True,
        max_shard_size: int | str = "50GB",
        save_function: object = None,
        safe_serialization: bool = True,
    ) -> None:
        """Writes a checkpoint in the released format.

        What is written is said by the heads that the model has, whatever its configuration says.

        Args:
            save_directory: a folder, made if it is missing; files of an earlier checkpoint in it
                are replaced, each whole or not at all.
            is_main_process: whether this process writes.
            state_dict: where the heads' weights are, if the model's own are not all of them.
            heads_only: the heads and the base model's name, as the released trainer saves; False
                writes the base model, too.
            max_shard_size: of a file of the base model's weights.
            save_function, safe_serialization: ignored, as plain models of transformers 5 do; files
                are safetensors.

        Raises:
            ValueError: for heads alone whose base model has no name, or in the place of a base
                model; for heads that the format cannot express or that are not finite, or a base
                model that was dequantised on its way in; nothing is written.
        """
        if is_main_process:
            saving.save(
                self,
                os.fspath(save_directory),
                heads_only=heads_only,
                state_dict=state_dict,
                max_shard_size=max_shard_size,
            )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: object | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **options,
    ) -> AutoDecoOutput:
        """The base's logits, T and top-p of every position, and with labels the released losses.

        Args:
            labels: `[B, L]` ids, −100 where there is none; position t predicts label t + 1. The
                losses' gradients end at the heads.
            options: of the base's forward, as the arguments that are not named here.

        Raises:
            ValueError: for labels of another shape than the logits' rows, or a base model that does
                not make its logits with its output embedding, once a forward.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
        }
        given = {name: value for name, value in given.items() if value is not None} | options
        if isinstance(logits_to_keep, torch.Tensor) or logits_to_keep:
            given["logits_to_keep"] = logits_to_keep
        with _entering(self.llm.get_output_embeddings()) as entered:
            output = self.llm(**given, return_dict=True)
        if len(entered) != 1:
            raise ValueError(
                f"{type(self.llm).__name__} must run its output embedding once a forward, got "
                f"{len(entered)} times"
            )
        logits = output.logits
        T, top_p = self._predict(entered[0].detach(), logits.detach())
        losses = {}
        if labels is not None:
            if labels.shape != logits.shape[:-1]:
                rows, came = tuple(logits.shape[:-1]), tuple(labels.shape)
                raise ValueError(f"labels must be {rows}, one a row of logits, got {came}")
            target = F.pad(labels[:, 1:], (0, 1), value=-100).to(logits.device)
            predicted = self.temp_head is not None
            losses = heads_losses(
                logits.detach(), target, temperature=T, predicted=predicted, top_p=top_p
            )
            losses["loss"] = sum(losses.values())
        also = ("past_key_values", "hidden_states", "attentions", "router_logits")
        result = AutoDecoOutput(
            **losses,
            logits=logits,
            temp_logits=None if self.temp_head is None else T.unsqueeze(-1),
            top_p_logits=None if top_p is None else top_p.unsqueeze(-1),
            **{name: getattr(output, name, None) for name in also},
        )
        return result if return_dict is not False else result.to_tuple()

    def _predict(
        self, hidden: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """T and top-p of `hidden [B, L, H]` and `logits [B, L, V]`, `[B, L]` fp32 on the latter's
        device; T is 1 without a temperature head."""
        if self.temp_head is None:
            T = torch.ones(hidden.shape[:-1], device=hidden.device)
        else:
            T = predicted(self.temp_head, hidden)
        if self.top_p_head is None:
            return T.to(logits.device), None
        top_p = predicted_top_p(self.top_p_head, hidden, T, logits)
        return T.to(logits.device), top_p.to(logits.device)

    def generate(self, *args, **kwargs):
        """`generate` of the base model, every token at the T and top-p that the heads predict.

        Takes what `generate` of a model with a policy attached takes, `seed=` and `stream=`
        included: see `autodeco_fast.attach`. The heads are attached by the first call and stay.
        """
        self._attach()
        return self.llm.generate(*args, **kwargs)

    def _attach(self) -> None:
        """Attaches the heads to the base, unless these very ones are."""
        with _ATTACHING:
            kept, llm = self._attachment, self.llm
            if kept is not None:
                policy, embedding = kept.policy, llm.get_output_embeddings()
                now = llm, embedding, self.temp_head, self.top_p_head
                then = kept.model, kept.embedding, policy.head, policy.top_p_head
                if kept.attached and all(a is b for a, b in zip(now, then)):
                    return
                kept.detach()
            policy = AutoDecoPolicy(head=self.temp_head, top_p_head=self.top_p_head)
            self._attachment = attach(llm, policy)

    def __getstate__(self) -> dict:
        """Copies and pickles are unattached; the base makes a plain one of itself."""
        return {**super().__getstate__(), "_attachment": None}

    def train(self, mode: bool = True) -> "AutoDecoModelForCausalLM":
        super().train(mode)
        self.llm.eval()
        return self

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's."""
        return self.llm.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        if "llm" in self._modules:  # not while the class of all models is being initialised
            self.llm.generation_config = value

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.llm.prepare_inputs_for_generation(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.llm.set_output_embeddings(value)

    def set_attn_implementation(self, *args, **kwargs) -> None:
        self.llm.set_attn_implementation(*args, **kwargs)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        embedding = self.llm.resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.llm.config.vocab_size
        return embedding

    def _heads(self) -> list[nn.Module]:
        """Those that are used."""
        return [head for head in (self.temp_head, self.top_p_head) if head is not None]


@contextmanager
def _entering(embedding: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What this thread lets enter the output embedding meanwhile."""
    thread, entered = threading.get_ident(), []

    def see(_, args, kwargs):
        if threading.get_ident() == thread:
            entered.append(args[0] if args else next(iter(kwargs.values())))

    handle = embedding.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield entered
    finally:
        handle.remove()


AutoConfig.register(MODEL_TYPE, AutoDecoConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM):
    _auto.register(AutoDecoConfig, AutoDecoModelForCausalLM, exist_ok=True)
