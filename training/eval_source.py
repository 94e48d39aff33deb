"""What an evaluation draws from, and what models and policies are known by."""

from collections.abc import Sequence

import torch

from autodeco_fast.policies import Policy
from autodeco_fast.training import base_model
from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.eval_requests import Source
from autodeco_fast.training.prompts import Prompt
from autodeco_fast.training.scan_store import fingerprint


def source_of(
    config: EvalConfig, prompts: Sequence[Prompt], device: torch.device | None = None
) -> tuple[Source, dict]:
    """What samples are drawn from, on this device (by default CUDA's, if there is one), and what it
    is known by."""
    drawn = {"max_new_tokens": config.max_new_tokens, "stop": config.stop}
    if config.endpoint is not None:
        from autodeco_fast.training.eval_endpoint import Endpoint

        source = Endpoint(config.endpoint, config.endpoint_model, prompts, **drawn)
        return source, {"endpoint": config.endpoint, "endpoint_model": config.endpoint_model}
    from autodeco_fast.autodeco import AutoDecoModelForCausalLM  # from now on transformers knows it
    from autodeco_fast.training.drawing import known_by
    from autodeco_fast.training.eval_model import LocalModel

    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype, None) or base_model.frozen_dtype(device)
    tokenizer = base_model.load_tokenizer(config.model)
    model = base_model.load_on(config.model, dtype, device, config.device_map)
    if isinstance(model, AutoDecoModelForCausalLM):
        model = model.llm  # a policy draws from it: autodeco=… is its own heads
    source = LocalModel(model, tokenizer, prompts, **drawn)
    identity = {
        "model": model_fingerprint(model, tokenizer),
        "dtype": str(dtype),
        **known_by(source.ids, source.eos.tolist()),
    }
    return source, identity


def model_fingerprint(model, tokenizer) -> str:
    """Of the names, shapes and some values of every weight, and of the vocabulary."""
    vocabulary = repr(sorted(tokenizer.get_vocab().items())).encode()
    return fingerprint(vocabulary, *base_model.glance(model))


def policy_fingerprint(policy: Policy) -> str:
    """Of its text and, of heads, their weights."""
    parts: list[bytes | torch.Tensor] = [str(policy).encode()]
    for name in ("head", "top_p_head"):
        head = getattr(policy, name, None)
        if head is not None:
            parts.append(repr(head).encode())
            parts += [t.float() for _, t in sorted(head.state_dict().items())]
    return fingerprint(*parts)
