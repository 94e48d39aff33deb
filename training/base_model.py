"""A frozen base model seen from its output embedding: what enters it, and how logits follow from that.

z = softcap·tanh(logit_scale·(h Wᵀ + b) / softcap)          (no softcap: no tanh)
"""

from dataclasses import dataclass

import torch

from autodeco_fast import TokenStats, token_stats
from autodeco_fast.ops.checks import check_plain

# Where configurations keep a linear factor of the logits.
_MULTIPLIED_BY, _DIVIDED_BY = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)


@dataclass(frozen=True)
class BaseModel:
    """A model of transformers with its output transform; `verify` says whether that was read correctly."""

    model: torch.nn.Module
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    @torch.inference_mode()
    def hidden(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What enters the output embedding. [B, L] → [B, L, H]"""
        return self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def stats(self, hidden: torch.Tensor, target: torch.Tensor) -> TokenStats:
        """`token_stats` of [N, H] and [N]."""
        transform = {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        return token_stats(hidden.to(self.weight.dtype), self.weight, target, **transform)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] → [N, V] fp32."""
        z = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float() * self.logit_scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    @torch.inference_mode()
    def verify(self, input_ids: torch.Tensor) -> None:
        """Compares our logits of one row of ids with the model's own.

        Raises:
            ValueError: if they differ: the model does to its logits what this class does not know of.
        """
        ours = self.logits(self.hidden(input_ids)[0, -1:])
        theirs = self.model(input_ids=input_ids).logits[0, -1:].float()
        if not torch.allclose(ours, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item()):
            raise ValueError(f"{type(self.model).__name__} transforms its logits in a way that is not supported")


def wrap(model) -> BaseModel:
    """Freezes a causal language model and reads its output transform from its configuration.

    Raises:
        ValueError: for an LM head that is missing, adapted, quantised, sharded or offloaded: its weight is not all of it.
    """
    model.eval().requires_grad_(False)
    embedding = model.get_output_embeddings()
    if embedding is None:
        raise ValueError(f"{type(model).__name__} has no output embedding")
    if hasattr(embedding, "base_layer"):
        raise ValueError("the LM head carries an adapter (LoRA): merge it first, for example with model.merge_and_unload()")
    check_plain(embedding.weight)
    if embedding.weight.is_meta or embedding.weight.numel() == 0:
        raise ValueError("the LM head's weight is not on this device: it is offloaded, or another process holds it")
    config = model.config.get_text_config()
    scale = 1.0
    for key in _MULTIPLIED_BY:
        scale *= getattr(config, key, None) or 1.0
    for key in _DIVIDED_BY:
        scale /= getattr(config, key, None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return BaseModel(model, embedding.weight.detach(), getattr(embedding, "bias", None), scale, softcap)


def _found(load, name: str):
    """`load(name)`, its complaint about a model that is not there on one line."""
    try:
        return load(name)
    except OSError as error:
        raise ValueError(f"model must be a folder or a hub id, got {name!r}: {str(error).splitlines()[0]}") from None


def load_tokenizer(name: str):
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoTokenizer

    return _found(AutoTokenizer.from_pretrained, name)


def load(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> BaseModel:
    """The frozen model of a folder or hub id.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return wrap(_found(lambda n: AutoModelForCausalLM.from_pretrained(n, dtype=dtype), name).to(device))
