"""Attaching is all or nothing; copies, pickles and folders are those of the model alone."""

import copy
import io
import pickle

import pytest
import torch
from torch.nn.utils.parametrize import register_parametrization
from transformers import CompileConfig

from autodeco_fast import TemperatureHead, attach, detach
from tests.tiny_models import (
    every_model,
    first_tokens,
    of_one_layer,
    prompts,
    tiny_head,
    tiny_model,
)


def _counting(module, args, output=None):
    """Somebody's own hook, which copies keep."""


def saved(thing) -> tuple[object, bytes]:
    """What torch loads of what it saved, and the bytes."""
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    weights_only = isinstance(thing, torch.Tensor)
    return torch.load(file, weights_only=weights_only), file.getvalue()


@every_model
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_an_attached_model_are_plain(name, how):
    model, ids = tiny_model(name), prompts()
    cls, want = type(model), model(ids).logits
    other = []
    model.get_output_embeddings().register_forward_hook(_counting)
    with attach(model, tiny_head(model)) as attachment:
        adaptive = model.generate(ids, max_new_tokens=5, seed=0)
        if how == "deepcopy":
            got = copy.deepcopy(model)
        elif how == "pickle":
            got = pickle.loads(pickle.dumps(model))
        else:
            got, written = saved(model)
            assert b"autodeco" not in written
        assert attachment.attached
        assert torch.equal(model.generate(ids, max_new_tokens=5, seed=0), adaptive)
        assert type(got) is cls
        embedding = got.get_output_embeddings()
        assert embedding is not model.get_output_embeddings()
        assert (len(embedding._forward_hooks), len(embedding._forward_pre_hooks)) == (1, 0)
        assert not any((got._forward_hooks, got._forward_pre_hooks))
        assert torch.equal(got(ids).logits, want)
        assert got.state_dict().keys() == model.state_dict().keys()
        got(ids, labels=ids).loss.backward()
        assert model.get_output_embeddings().weight.grad is None
        assert embedding.weight.grad is not None
        attach(got, tiny_head(got)).detach()
    assert not other


@pytest.mark.parametrize("by", ["the user", "generate"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_a_compiled_model_runs_its_own_weights(by, how):
    model, ids = of_one_layer("llama"), prompts()
    if by == "the user":
        model.compile(backend="eager")
    with attach(model, tiny_head(model)):
        if by == "generate":
            model.get_compiled_call(CompileConfig(backend="eager"))
        got = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert not {"_compiled_call_impl", "_compiled_call", "_last_compile_config"} & set(vars(got))
    torch.nn.init.zeros_(got.lm_head.weight)
    assert not got(ids).logits.any()
    assert model(ids).logits.any()


@every_model
def test_copies_of_an_attached_output_embedding_are_plain(name):
    model, other = tiny_model(name), tiny_model(name)
    embedding = model.get_output_embeddings()
    other.set_output_embeddings(embedding)
    embedding.register_forward_pre_hook(_counting)
    before = set(vars(embedding))
    first, second = attach(model, tiny_head(model)), attach(other, tiny_head(model))
    for attachment in (None, first):
        if attachment is not None:
            attachment.detach()
        loaded, written = saved(embedding)
        assert b"autodeco" not in written
        for got in (copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding)), loaded):
            assert type(got) is torch.nn.Linear
            assert set(vars(got)) == before
            assert list(got._forward_pre_hooks.values()) == [_counting]
            assert not got._forward_pre_hooks_with_kwargs
            assert torch.equal(got.weight, embedding.weight)
            assert got.weight is not embedding.weight
    second.detach()
    assert set(vars(embedding)) == before


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_copies_of_a_parametrized_output_embedding_are_plain():
    """Whose class has a `__deepcopy__` of its own."""
    model, ids = tiny_model("llama"), prompts()
    register_parametrization(model.lm_head, "weight", Doubled())
    model.lm_head.register_forward_pre_hook(_counting)
    want, before = model(ids).logits, set(vars(model.lm_head))
    with attach(model, tiny_head(model)):
        copied, heads = copy.deepcopy(model), [copy.deepcopy(model.lm_head)]
    assert torch.equal(copied(ids).logits, want)
    for embedding in (model.lm_head, copied.lm_head, *heads):
        assert set(vars(embedding)) == before
        assert list(embedding._forward_pre_hooks.values()) == [_counting]


def test_copies_of_what_enters_the_output_embedding_are_plain():
    model, ids, found = tiny_model("llama"), prompts(), []

    def hook(_, args):
        (hidden,) = args
        loaded, written = saved(hidden)
        assert b"autodeco" not in written
        for got in (copy.deepcopy(hidden), pickle.loads(pickle.dumps(hidden)), loaded):
            assert type(got) is torch.Tensor
            assert torch.equal(got, hidden)
            assert got.data_ptr() != hidden.data_ptr()
        found.append(type(hidden))

    with attach(model, tiny_head(model)) as attachment:
        model.lm_head.register_forward_pre_hook(hook)
        model.generate(ids, max_new_tokens=2)
        assert attachment.lazy
    assert len(found) == 2
    assert torch.Tensor not in found


def test_peft_copies_the_output_embedding_of_an_attached_model():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model("llama"), prompts()
    with attach(model, tiny_head(model)):
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        wrapped = peft.get_peft_model(model, config)
        with pytest.raises(RuntimeError, match="output embedding was replaced after attach"):
            wrapped.generate(input_ids=ids, max_new_tokens=2)
    with attach(wrapped, tiny_head(model)):
        assert wrapped.generate(input_ids=ids, max_new_tokens=2).shape == (2, 7)


def test_an_attached_model_saves_as_if_it_were_not(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "plain")
    with attach(model, tiny_head(model)):
        model.generate(prompts(), max_new_tokens=2)
        model.save_pretrained(tmp_path / "attached")
    for file in sorted((tmp_path / "plain").iterdir()):
        assert (tmp_path / "attached" / file.name).read_bytes() == file.read_bytes(), file.name


def test_attaching_is_all_or_nothing():
    model = tiny_model("llama")
    before, cls = model.generation_config, type(model)
    model.generation_config = None
    attach(model, tiny_head(model)).detach()
    model.generation_config = before

    class Broken(TemperatureHead):
        def to(self, *args, **kwargs):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        attach(model, Broken(32))
    assert type(model) is cls
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_detaching_without_the_handle():
    model = tiny_model("llama")
    cls = type(model)
    detach(model)  # nothing is attached: nothing happens
    attach(model, tiny_head(model))
    detach(model)
    detach(model)
    assert type(model) is cls


def test_a_peft_model_is_taken_for_the_model_inside():
    peft = pytest.importorskip("peft")
    model, ids = tiny_model("llama"), prompts()
    head = tiny_head(model)
    with attach(model, head):
        want = model.generate(ids, max_new_tokens=6, seed=1)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    with attach(wrapped, head):
        assert torch.equal(wrapped.generate(input_ids=ids, max_new_tokens=6, seed=1), want)
    attach(wrapped, head)
    detach(wrapped)
    assert first_tokens(model, ids[:1], 2, do_sample=True).shape == (2,)
