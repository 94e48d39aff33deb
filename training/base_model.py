"""A frozen base model seen from its output embedding: what enters it, what logits follow from it.

z = softcap·tanh(logit_scale·(h Wᵀ + b) / softcap)          (no softcap: no tanh)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from autodeco_fast import TokenStats, causal_lm, token_stats
from autodeco_fast.autodeco.layout import MODEL_TYPE
from autodeco_fast.causal_lm import FOUND
from autodeco_fast.errors import foreign
from autodeco_fast.lm_head import transform_
from autodeco_fast.ops.checks import check_plain
from autodeco_fast.training.placed import (
    VocabSlice,
    is_sharded,
    lm_head_tensors,
    seen_hidden,
    whole,
)
from autodeco_fast.training.processes import several

# Where configurations keep a linear factor of the logits, and their cap. `verify` finds what is
# missing here.
_MULTIPLIED_BY, _DIVIDED_BY = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
_CAPPED_AT = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_ENLARGED_TO = 256.0


@dataclass(frozen=True)
class BaseModel:
    """A model of transformers with its output transform; `verify` checks the transform."""

    model: torch.nn.Module
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    # Whether processes share the model (FSDP2), so that a forward is one of all of them.
    sharded: bool = False
    # Where processes share the vocabulary: which of it weight and bias are of.
    part: VocabSlice | None = None

    @property
    def vocabulary(self) -> int:
        """How many ids the model takes."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def ends(self) -> list[int]:
        """Ids after which a text of it ends; none where it leaves that to the tokenizer."""
        return _listed(getattr(self.model.generation_config, "eos_token_id", None))

    def example_length(self, wanted: int) -> int:
        """Tokens of an example at most where `wanted` are asked for: the model has positions."""
        return example_length(wanted, positions(self.model.config))

    @torch.inference_mode()
    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What enters the output embedding. [B, L] → [B, L, H]

        Raises:
            ValueError: if the model inside does not return it.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.sharded:
            with seen_hidden(self.model) as seen:
                self.model(**given, logits_to_keep=1)
            return seen[0]
        output = self.model.base_model(**given)
        if not hasattr(output, "last_hidden_state"):
            raise ValueError(
                f"{type(self.model).__name__} does not show what enters its output embedding"
            )
        return output.last_hidden_state.to(self.weight.device)

    def check_own(self) -> None:
        """Raises ValueError for a model that processes share, whose forwards are not this one's to
        make."""
        if self.sharded or self.part is not None:
            raise ValueError(
                "a base model that processes share can be scanned, and heads trained from the scan"
            )

    def lm_head(self) -> list[torch.Tensor]:
        """Weight `[V, H]` and, if there is one, bias `[V]`: all of them."""
        if self.part is None:
            return [self.weight, *([] if self.bias is None else [self.bias])]
        embedding = self.model.get_output_embeddings()
        bias = getattr(embedding, "bias", None)
        return [whole(t) for t in (embedding.weight, bias) if t is not None]

    def stats(self, hidden: torch.Tensor, target: torch.Tensor) -> TokenStats:
        """`token_stats` of [N, H] and [N]."""
        transform = {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        stats = token_stats if self.part is None else self.part.stats
        return stats(hidden.to(self.weight.dtype), self.weight, target, **transform)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, H] → [N, V] fp32."""
        z = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        z = z if self.part is None else self.part.gathered(z)
        return transform_(z, self.logit_scale, self.softcap)

    @torch.inference_mode()
    def verify(self, input_ids: torch.Tensor) -> None:
        """Runs the whole model on one sequence of ids and compares what it does with what this
        class does.

        Then once more, with what enters the output embedding so enlarged on its way that a cap or a
        scale that we do not know of shows, however small the logits of these ids are.

        Raises:
            ValueError: if `hidden` is not what enters the output embedding, `logits` not what the
                model makes of it, or hidden states depend on what follows.
        """
        name = type(self.model).__name__
        entered, theirs = self._watched(input_ids)
        if not _alike(self.hidden(input_ids)[0], entered):
            raise ValueError(
                f"{name} changes hidden states before its output embedding in a way that is not "
                "supported"
            )
        prefix = self.hidden(input_ids[:, : (input_ids.shape[1] + 1) // 2])[0].float()
        away = (entered[: len(prefix)].float() - prefix).norm()
        if away > 0.05 * prefix.norm():  # more than roundings in bf16
            raise ValueError(
                f"{name} is not causal: in a whole sequence its hidden states have seen the tokens "
                "they predict"
            )
        factor = max(1.0, _ENLARGED_TO / theirs.abs().max().item())
        entered, theirs = self._watched(input_ids, factor)
        if not _alike(self.logits(entered * factor), theirs):
            raise ValueError(f"{name} transforms its logits in a way that is not supported")

    def _watched(
        self, input_ids: torch.Tensor, factor: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What enters the output embedding, `[L, H]`, and the logits `[L, V]` that the model makes
        of `factor` times it."""
        entered = []

        def watch(_, args):
            entered.append(args[0])
            return (args[0] * factor, *args[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(watch)
        try:
            logits = self.model(input_ids=input_ids, use_cache=False).logits[0].float()
        finally:
            handle.remove()
        if len(entered) != 1:
            name = type(self.model).__name__
            raise ValueError(
                f"{name} makes its logits without its output embedding: heads cannot be trained "
                "for it"
            )
        return entered[0][0].to(self.weight.device), logits.to(self.weight.device)


def glance(model: torch.nn.Module) -> Iterator[bytes | torch.Tensor]:
    """Names, shapes and some values of every weight, by which `fingerprint` tells models apart. Of
    weights that are offloaded there are no values to see."""
    for name, weight in sorted(model.named_parameters()):
        yield f"{name} {tuple(weight.shape)}".encode()
        if not weight.is_meta:
            flat = weight.detach().flatten()
            yield flat[:: max(1, len(flat) // 1024)].float()


def _alike(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal but for a few roundings in bf16."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.float(), theirs.float()
    return torch.allclose(ours, theirs, rtol=0.03, atol=0.01 * theirs.abs().max().item())


def wrap(model) -> BaseModel:
    """Freezes a causal language model and reads its output transform from its configuration.

    One that accelerate has dispatched keeps its place; so does one that processes share
    (`fully_shard`, or `tp_plan`), in all of which this must be called. See `training/placed.py`.

    Raises:
        ValueError: for an LM head that is missing, adapted or quantised, or not in this process:
            its weight is not all of it.
    """
    sharded = is_sharded(model)
    model.eval()
    if not sharded:  # its parameters are FSDP's
        model.requires_grad_(False)
    embedding = model.get_output_embeddings()
    if embedding is None:
        raise ValueError(f"{type(model).__name__} has no output embedding")
    if hasattr(embedding, "base_layer"):
        raise ValueError(
            "the LM head carries an adapter (LoRA): merge it first, for example with "
            "model.merge_and_unload()"
        )
    part = VocabSlice.of(model, embedding.weight)
    weight, bias = lm_head_tensors(embedding, part)
    check_plain(weight)
    if weight.is_meta or weight.numel() == 0:
        raise ValueError("the LM head's weight is not on this device: another process holds it")
    config = model.config.get_text_config()
    scale = 1.0
    for key in _MULTIPLIED_BY:
        scale *= getattr(config, key, None) or 1.0
    for key in _DIVIDED_BY:
        scale /= getattr(config, key, None) or 1.0
    softcap = next((cap for key in _CAPPED_AT if (cap := getattr(config, key, None))), None)
    return BaseModel(
        model=model,
        weight=weight,
        bias=bias,
        logit_scale=scale,
        softcap=softcap,
        sharded=sharded,
        part=part,
    )


def load_tokenizer(name: str):
    """The tokenizer of a folder or hub id.

    Raises:
        ValueError: if there is none.
    """
    with foreign(FOUND.format(name)):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)


def positions(config) -> int | None:
    """Positions that a model's configuration says there are, if it does."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def end_ids(model, tokenizer) -> list[int]:
    """The ids after which a text of the model ends; none if it knows none."""
    end = getattr(model.generation_config, "eos_token_id", None)
    return _listed(tokenizer.eos_token_id if end is None else end)


def _listed(end: int | Sequence[int] | None) -> list[int]:
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def left_padded(
    prompts: Sequence[list[int]], pad: int, device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[B, L]` and their mask."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def example_length(wanted: int, limit: int | None) -> int:
    return min(wanted, limit or wanted)


@dataclass(frozen=True)
class Facts:
    """What a model's configurations say, before its weights are loaded; None where they do not."""

    vocabulary: int | None
    positions: int | None  # tokens of a sequence at most
    ends: list[int]  # those of BaseModel


def _config(name: str):
    _refuse_checkpoint(name)
    with foreign(FOUND.format(name)):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(name)


def _refuse_checkpoint(name: str) -> None:
    """Raises ValueError for AutoDeco's, which transformers would call a model of its future."""
    with foreign(FOUND.format(name)):
        from transformers import PreTrainedConfig

        found, _ = PreTrainedConfig.get_config_dict(name)
    if found.get("model_type") == MODEL_TYPE:
        raise ValueError(
            f"model {name!r} is an AutoDeco checkpoint, its base model is needed: `autodeco-fast "
            "split` takes it out of a merged one"
        )


def facts(name: str) -> Facts:
    """Of a folder or hub id.

    Raises:
        ValueError: if there is none.
    """
    config = _config(name)
    with foreign(FOUND.format(name)):
        from transformers import GenerationConfig

        try:
            generation = GenerationConfig.from_pretrained(name)
        except OSError:  # it has none, as transformers takes it
            generation = GenerationConfig.from_model_config(config)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    return Facts(vocabulary, positions(config), _listed(generation.eos_token_id))


def width(name: str) -> int:
    """Of what enters the output embedding of a folder's or hub id's model; nothing is allocated.

    Raises:
        ValueError: if there is none, or it is no causal language model.
    """
    config = _config(name)
    with foreign(FOUND.format(name)), torch.device("meta"):
        from transformers import AutoModelForCausalLM

        return causal_lm.embedding_width(AutoModelForCausalLM.from_config(config))


def load_causal_lm(name: str, **options):
    """The model of a folder or hub id, with all of its weights and without a progress bar.

    Raises:
        ValueError: as `causal_lm.load`.
    """
    with foreign(FOUND.format(name)):
        from transformers.utils import logging

        logging.disable_progress_bar()
    return causal_lm.load(name, **options)


def frozen_dtype(device: torch.device | str) -> torch.dtype:
    """What a frozen model runs in: bf16, or fp32 on CPUs that only emulate bf16, which is slow."""
    emulated = (
        torch.device(device).type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.float32 if emulated else torch.bfloat16


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    device_map: str | None = None,
) -> BaseModel:
    """The frozen model of a folder or hub id, on a device or where `device_map` puts it.

    Raises:
        ValueError: as `load_causal_lm` and `wrap`.
    """
    _refuse_checkpoint(name)
    return wrap(load_on(name, dtype, device, device_map))


def load_on(
    name: str, dtype: torch.dtype, device: torch.device | str, device_map: str | None = None
):
    """`load_causal_lm` on a device, or where accelerate puts it by `device_map`.

    Raises:
        ValueError: as `load_causal_lm`; for several processes, which would each fill all devices.
    """
    if device_map is None:
        return load_causal_lm(name, dtype=dtype).to(device)
    if several():
        raise ValueError(f"device_map {device_map!r} is for one process, got several")
    return load_causal_lm(name, dtype=dtype, device_map=device_map)
