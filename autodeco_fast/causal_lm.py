"""Causal language models as transformers loads them, all of their weights, and what is odd in a
line."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from autodeco_fast.errors import foreign

FOUND = "model must be a folder or a hub id of a causal language model, got {!r}"


@contextmanager
def _quiet():
    """transformers prints a table of what we say in a line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def embedding_width(model: nn.Module) -> int:
    """Width H of what enters the output embedding, whose weight may be packed or have no name.

    Raises:
        ValueError: if the model has none.
    """
    embedding = model.get_output_embeddings()
    if embedding is None:
        raise ValueError(f"{type(model).__name__} has no output embedding")
    return getattr(embedding, "in_features", None) or embedding.weight.shape[-1]


def embedding_device(model: nn.Module) -> torch.device:
    """Where the output embedding of a model lies; that of the model if it holds no tensors."""
    embedding = model.get_output_embeddings()
    held = next(chain(embedding.parameters(), embedding.buffers()), None)
    return model.device if held is None else held.device


def load(
    name: str,
    *,
    what: str = "model",
    complaint: str | None = None,
    known: Callable[[str], bool] = lambda tensor: False,
    **options,
):
    """The model of a folder or hub id, with all of its weights.

    Args:
        what: the setting, for complaints.
        complaint: what those of transformers' loader begin with; `FOUND` by default.
        known: whether a tensor that the model does not use is no surprise.
        options: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: if there is none, or weights are missing, which transformers would draw at
            random.
    """
    with foreign(FOUND.format(name) if complaint is None else complaint):
        from transformers import AutoModelForCausalLM

        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, **options
            )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{what} {name!r} lacks {len(missing)} of its weights: {missing[0]} …")
    unused = sorted(key for key in info["unexpected_keys"] if not known(key))
    if unused:
        warnings.warn(
            f"{what} {name!r} has {len(unused)} tensors that {type(model).__name__} does not use: "
            f"{unused[0]} …",
            stacklevel=3,
        )
    return model
