"""`attach(model, policy)`: a model whose `generate` samples every token as a policy says, or at the
temperature of a head; `detach` gives the model back."""

import reprlib
from dataclasses import replace

from torch import nn
from transformers import GenerationMixin

from autodeco_fast.autodeco.layout import MODEL_TYPE
from autodeco_fast.causal_lm import embedding_width
from autodeco_fast.generation.attachment import Attachment
from autodeco_fast.policies.autodeco import AutoDecoPolicy
from autodeco_fast.policies.base import Policy
from autodeco_fast.policies.fixed import HeadPolicy
from autodeco_fast.values import finite


def _inside(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model


def _advice(model: object) -> str:
    """What to attach to instead of something that holds a model that generates."""
    if isinstance(getattr(model, "_orig_mod", None), GenerationMixin):
        return ": attach to the model before compiling it"
    if isinstance(getattr(model, "model", None), GenerationMixin):
        return ": attach to its model, like pipe.model"
    if isinstance(_inside(getattr(model, "module", None)), GenerationMixin):
        return ": attach to the model inside it, its .module"
    return ""


def _policy(
    head_or_policy: nn.Module | Policy,
    top_p_head: nn.Module | None,
    scale: float,
    **own: float | None,
) -> Policy:
    """The policy, with what was said of it beside."""
    given = {name: value for name, value in own.items() if value is not None}
    if not isinstance(head_or_policy, (nn.Module, Policy)):
        raise ValueError(
            f"head_or_policy must be a head or a policy, got {reprlib.repr(head_or_policy)}; "
            "policies.parse makes one of a text"
        )
    if not isinstance(head_or_policy, Policy):
        if top_p_head is None:
            return HeadPolicy(head=head_or_policy, scale=scale, **given)
        return AutoDecoPolicy(head=head_or_policy, top_p_head=top_p_head, scale=scale, **given)
    if top_p_head is not None:
        raise ValueError(f"top_p_head goes with a temperature head, got policy '{head_or_policy}'")
    if scale != 1.0:
        given["scale"] = head_or_policy.scale * finite("scale", scale)
    return replace(head_or_policy, **given)


def attach(
    model: GenerationMixin,
    head_or_policy: nn.Module | Policy,
    *,
    top_p_head: nn.Module | None = None,
    min_p: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    scale: float = 1.0,
    fused: bool = True,
    record: bool = False,
) -> Attachment:
    """Makes `model.generate` follow a policy: tokens are sampled from `softmax(z / T)` inside a
    cut.

    With a head, T = head(h) and the cut is Min-P; with AutoDeco's two heads it is the top-p that
    the second one predicts; see `autodeco_fast.policies` for others.

    While attached, `generate`

    * samples unless `do_sample=False` is passed, which is greedy decoding of the model itself;
    * takes `seed=`: an integer, or one a prompt, under which a prompt's text is the same alone and
      in any batch. Under one integer the noise of a row depends on its number in the batch: row 1
      alone gets the noise of row 0. Without a seed `torch.manual_seed` fixes the output;
    * takes `stream=`: an integer, or one a row (prompts × num_return_sequences), in place of the
      row's number;
    * ignores `do_sample`, the temperature, top-k, top-p and other cuts that the model's generation
      configuration or a pipeline brings, and honours those passed in the call, as arguments or in a
      configuration (of one that is or was made of the model's, what differs from it): a temperature
      multiplies the policy's, a `min_p`, `top_k` or `top_p` replaces the policy's, but for a top-p
      that is predicted, which cuts after them;
    * raises ValueError for beams, guidance, sequence biases, contrastive, DoLa, constrained and
      custom decoding, and continuous batching, and if a policy that remembers (adaptive-p) is asked
      for what the fused sampler cannot serve; RuntimeError, at its end, if a row held NaN, inf or
      nothing that is not masked.

    Logits processors see scaled logits, as do `output_scores` and `output_logits`. A row with T <
    1e-3 is greedy. Forwards of your own, in a stopping criterion or a streamer too, return the
    model's own logits. Copies, pickles and saved folders of an attached model are those of the
    model alone. With `seed=`, calls that the fused sampler cannot serve seed torch's default
    generator, which threads share, and put its state back.

    Args:
        model: a causal language model of transformers, or a PeftModel around one. Two tokens are
            run through it.
        head_or_policy: a head predicts `T [...]` from `h [..., H]` and is moved to the model's
            device; a `Policy` picks T and the cut.
        top_p_head: a `TopPHead`, beside a temperature head: `AutoDecoPolicy`.
        min_p: in [0, 1]; 0 cuts nothing. None leaves the policy's, which for a head is the one it
            was trained for, 0.1 if it does not know, and for two heads 0; another one warns.
        t_min, t_max: ends of T, in place of the policy's.
        scale: factor on the policy's T, before it is held between them.
        fused: False leaves transformers' sampling step in place throughout.
        record: whether to keep T (times a temperature of the call), the kept set's size and a
            predicted top-p of every row and step of a call, in `Attachment.records`: entry i is of
            the i-th new token. Rows that have ended go on being recorded. Makes the logits to
            count.

    Returns:
        An `Attachment`: a context manager with `.detach()`, and `.records`. Neither ends while a
        `generate` runs in another thread: join it, or read its streamer to the end, inside the
        block. Where an exception ends the block, the policy is detached when the last call has
        ended.

    Raises:
        TypeError: if `model` cannot generate.
        ValueError: if a head or policy is attached already, the model is an AutoDeco checkpoint,
            the widths differ, the model is no decoder, its logits are not made by its output
            embedding, or an option is out of range.
    """
    model = _inside(model)
    if not isinstance(model, GenerationMixin):
        raise TypeError(
            f"attach() needs a transformers model that generates, got {type(model).__name__}"
            f"{_advice(model)}"
        )
    if model.config.model_type == MODEL_TYPE:
        raise ValueError(
            f"a {type(model).__name__} draws with its own heads: attach to its base, model.llm"
        )
    if hasattr(type(model), "_autodeco_attachment"):
        raise ValueError("a policy is attached to this model already; detach() it first")
    policy = _policy(head_or_policy, top_p_head, scale, min_p=min_p, t_min=t_min, t_max=t_max)
    if model.config.is_encoder_decoder:
        raise ValueError("attach() needs a decoder-only model")
    width = embedding_width(model)
    if policy.hidden_size not in (None, width):
        raise ValueError(
            f"the head reads hidden states of width {policy.hidden_size}, the model's have {width}"
        )
    return Attachment(model, policy, fused=fused, record=record)


def detach(model: GenerationMixin) -> None:
    """Takes the policy off a model; nothing happens if none is attached.

    Raises:
        ValueError: if the model is an AutoDeco checkpoint, whose own heads stay.
    """
    model = _inside(model)
    if isinstance(model, GenerationMixin) and model.config.model_type == MODEL_TYPE:
        raise ValueError(f"a {type(model).__name__} keeps its own heads: its base is model.llm")
    attachment = getattr(type(model), "_autodeco_attachment", None)
    if attachment is not None:
        attachment.detach()
