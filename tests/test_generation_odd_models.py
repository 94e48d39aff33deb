"""Models and heads that are not as most are: their own `generate`, their own output embedding, and
what may not happen while one runs."""

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from autodeco_fast import TemperatureHead, attach
from autodeco_fast.policies import MinK, parse
from tests.output_embeddings import Method, Nameless, Packed
from tests.tiny_models import NEVER, both_paths, prompts, tiny_head, tiny_model


def cold(width: int = 32) -> TemperatureHead:
    """A head whose T is 0."""
    head = TemperatureHead(width)
    nn.init.constant_(head.mlp[2].bias, -30.0)
    return head


class Gated(BaseStreamer):
    """Lets `generate` go on past its third token when it is told to."""

    def __init__(self):
        self.seen, self.there, self.go = 0, threading.Event(), threading.Event()

    def put(self, value):
        self.seen += 1
        if self.seen == 3:
            self.there.set()
            assert self.go.wait(60)

    def end(self):
        pass


@both_paths
def test_a_policy_stays_until_every_generate_has_ended(fused):
    model, ids, streamer, got = tiny_model("llama"), prompts(1), Gated(), {}
    want = model.generate(ids, max_new_tokens=8, do_sample=False)

    def run():
        got["ids"] = model.generate(ids, max_new_tokens=8, streamer=streamer, seed=0)

    thread = threading.Thread(target=run)
    attachment = attach(model, cold(), fused=fused)
    thread.start()
    assert streamer.there.wait(60)
    with pytest.raises(RuntimeError, match=r"detach\(\) came while generate runs"):
        attachment.detach()
    streamer.go.set()
    thread.join()
    assert torch.equal(got["ids"], want)
    attachment.detach()
    assert type(model) is LlamaForCausalLM


def test_an_exception_leaves_the_block_and_the_last_generate_detaches():
    model, ids, streamers, got = tiny_model("llama"), prompts(1), [Gated(), Gated()], {}
    want = model.generate(ids, max_new_tokens=8, do_sample=False)

    def run(k: int):
        got[k] = model.generate(ids, max_new_tokens=8, streamer=streamers[k], seed=0)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]

    def interrupted():
        with attachment:
            for thread, streamer in zip(threads, streamers):
                thread.start()
                assert streamer.there.wait(60)
            raise KeyboardInterrupt

    attachment = attach(model, cold())
    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    notes = ["a generate still runs: the policy is detached when it has ended"]
    assert getattr(caught.value, "__notes__", notes) == notes
    for thread, streamer in zip(threads, streamers):
        assert attachment.attached
        streamer.go.set()
        thread.join()
    assert all(torch.equal(tokens, want) for tokens in got.values())
    assert not attachment.attached
    assert type(model) is LlamaForCausalLM


def test_a_generate_that_began_before_the_policy_was_detached():
    model = tiny_model("llama")
    with attach(model, cold()):
        generate = model.generate
    with pytest.raises(RuntimeError, match="detached while this generate began: call again"):
        generate(prompts(1), max_new_tokens=2)


class Delegating(LlamaForCausalLM):
    def generate(self, inputs=None, generation_config=None, **kwargs):
        return self.__dict__["inside"].generate(inputs, generation_config, **kwargs)


@pytest.mark.parametrize("options", [{}, {"output_scores": True}, {"temperature": 0.5}])
@both_paths
def test_a_generate_of_another_model_inside_is_no_success(fused, options):
    model, inside = tiny_model("llama"), tiny_model("llama")
    model.__class__, model.__dict__["inside"] = Delegating, inside
    with attach(model, cold(), fused=fused), pytest.raises(RuntimeError, match="model inside it"):
        model.generate(prompts(), max_new_tokens=2, **options)


class Keywords(LlamaForCausalLM):
    def generate(self, input_ids=None, attention_mask=None, **kwargs):
        return super().generate(input_ids, attention_mask=attention_mask, **kwargs)


@both_paths
def test_a_generate_with_arguments_of_its_own(fused):
    model, ids = tiny_model("llama"), prompts()
    mask, config = torch.ones_like(ids), GenerationConfig(max_new_tokens=4)
    with attach(model, tiny_head(model), fused=fused):
        want = model.generate(ids, attention_mask=mask, generation_config=config, seed=0)
        assert torch.equal(model.generate(ids, config, attention_mask=mask, seed=0), want)
    model.__class__ = Keywords
    with attach(model, tiny_head(model), fused=fused):
        for call in (
            lambda: model.generate(ids, mask, generation_config=config, seed=0),
            lambda: model.generate(ids, attention_mask=mask, max_new_tokens=4, seed=0),
            lambda: model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, seed=0),
        ):
            assert torch.equal(call(), want)


def test_a_mask_of_floats():
    model, ids = tiny_model("llama"), prompts()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with attach(model, tiny_head(model)):
        want, got = (
            model.generate(ids, attention_mask=m, max_new_tokens=4, seed=[1, 2, 3][: len(ids)])
            for m in (mask, mask.float())
        )
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", [Packed, Nameless, Method])
def test_an_output_embedding_without_a_weight(kind):
    model, ids = tiny_model("llama"), prompts()
    with attach(model, tiny_head(model)):
        want = model.generate(ids, max_new_tokens=4, seed=0)
    model.lm_head = kind(model.lm_head)
    with attach(model, tiny_head(model)):
        assert torch.equal(model.generate(ids, max_new_tokens=4, seed=0), want)


class OneNumber(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, hidden):
        return torch.full((*hidden.shape[:-1], *self.shape), 1e-4)


def test_a_head_without_parameters():
    model, ids = tiny_model("llama"), prompts()
    with attach(model, OneNumber(())):
        got = model.generate(ids, max_new_tokens=4, seed=0)
    assert torch.equal(got, model.generate(ids, max_new_tokens=4, do_sample=False))
    with attach(model, OneNumber((1,))), pytest.raises(ValueError, match="must predict T of shape"):
        model.generate(ids, max_new_tokens=4)


def _with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("wrap", [_with_lora, torch.compile])
def test_a_copy_of_what_is_around_an_attached_model(wrap):
    model, ids = tiny_model("llama"), prompts()
    around = wrap(model)
    with attach(model, cold()):
        copied = copy.deepcopy(around)
    assert type(copied) is type(around)
    inside = next(m for m in copied.modules() if isinstance(m, LlamaForCausalLM))
    assert type(inside) is LlamaForCausalLM
    assert inside is not model
    tensors = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in tensors for p in inside.parameters())
    inside.generate(ids, max_new_tokens=2, do_sample=False)


@both_paths
def test_greedy_rows_take_the_lowest_of_tokens_that_tie(fused):
    """As they do in 16 bits, where logits are few."""
    model, ids = tiny_model("llama"), prompts(1)
    with torch.no_grad():
        model.lm_head.weight[40:80] = model.lm_head.weight[:40]
    want = model.generate(ids, max_new_tokens=8, do_sample=False)
    lookup = {"prompt_lookup_num_tokens": 2, "eos_token_id": NEVER}
    for options in ({}, {"output_logits": True}, lookup):
        with attach(model, parse("greedy"), fused=fused):
            for seed in range(4):
                got = model.generate(
                    ids, max_new_tokens=8, seed=seed, return_dict_in_generate=True, **options
                )
                assert torch.equal(got.sequences, want), options
    z = torch.tensor([[-1.0, 0.0, 0.0, -2.0]])
    drawn = {int(parse("greedy").sample(z, z, seed=seed).token) for seed in range(20)}
    assert drawn == {1}


def test_min_k_is_of_the_logits_before_any_temperature():
    model, ids, sizes = tiny_model("llama"), prompts(1), []
    with torch.no_grad():
        model.lm_head.weight.mul_(0.05)
    for options, call in (
        ({}, {}),
        ({"temperature": 0.5}, {}),
        ({"scale": 0.5}, {}),
        ({"t_max": 0.1}, {}),
        ({}, {"temperature": 0.5}),
        ({"t_max": 0.5}, {"temperature": 0.5}),
    ):
        with attach(model, MinK(**options), record=True) as attached:
            model.generate(ids, max_new_tokens=1, seed=0, **call)
            sizes.append(int(attached.records[0].kept))
    assert len(set(sizes)) == 1
    assert sizes[0] > 1
