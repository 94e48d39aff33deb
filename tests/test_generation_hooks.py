"""`attach` among hooks, patches and callbacks, and on models that transform their logits."""

import copy
import functools

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, RecurrentGemmaConfig, StoppingCriteria
from transformers import RecurrentGemmaForCausalLM as RecurrentGemma
from transformers.generation.streamers import BaseStreamer

from autodeco_fast import attach
from tests.tiny_models import (
    VOCAB,
    both_paths,
    every_model,
    logits_and_temperature,
    prompts,
    tiny_head,
    tiny_model,
)


def ban(logits: torch.Tensor, allowed: int) -> torch.Tensor:
    """Leaves one token, in place."""
    assert logits.shape[-1] == VOCAB
    keep = logits[..., allowed].clone()
    logits[...] = float("-inf")
    logits[..., allowed] = keep
    return logits


@every_model
@both_paths
@pytest.mark.parametrize("when", ["before attach", "after the first call"])
def test_a_hook_on_the_model_has_its_say(name, fused, when):
    model, ids = tiny_model(name), prompts()

    def hook(_, args, output):
        ban(output.logits, 7)

    if when == "before attach":
        model.register_forward_hook(hook)
    with attach(model, tiny_head(model), fused=fused):
        if when == "after the first call":
            model.generate(ids, max_new_tokens=2, seed=0)
            model.register_forward_hook(hook)
        assert (model.generate(ids, max_new_tokens=4, seed=0)[:, 5:] == 7).all()


@every_model
@both_paths
def test_a_patched_forward_has_its_say(name, fused):
    model, ids = tiny_model(name), prompts()
    original = model.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = ban(output.logits, 9)
        return output

    with attach(model, tiny_head(model), fused=fused):
        model.generate(ids, max_new_tokens=2, seed=0)
        model.forward = forward
        assert (model.generate(ids, max_new_tokens=4, seed=0)[:, 5:] == 9).all()
        del model.forward


@every_model
@both_paths
def test_a_hook_on_the_embedding_has_its_say(name, fused):
    model, ids = tiny_model(name), prompts()
    with (
        attach(model, tiny_head(model), fused=fused),
        model.get_output_embeddings().register_forward_hook(lambda _, args, z: ban(z, 8)),
    ):
        assert (model.generate(ids, max_new_tokens=4, seed=0)[:, 5:] == 8).all()


@every_model
@both_paths
def test_callbacks_find_the_model_as_it_is(name, fused):
    """A stopping criterion, a streamer and a processor that run the model, or its `generate`,
    themselves."""
    model, ids = tiny_model(name), prompts(1)
    want, seen = model(ids).logits, []

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(model(ids).logits)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    class Stream(BaseStreamer):
        def put(self, value):
            seen.append(model(ids).logits)

        def end(self):
            seen.append(model(ids).logits)

    class Process(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(model(ids).logits)
            assert torch.equal(model.generate(ids, max_new_tokens=3, seed=4), alone)
            return scores

    with attach(model, tiny_head(model), fused=fused):
        alone = model.generate(ids, max_new_tokens=3, seed=4)
        quiet = model.generate(ids, max_new_tokens=4, seed=1)
        callbacks = {
            "stopping_criteria": [Stop()],
            "logits_processor": [Process()],
            "streamer": Stream(),
        }
        got = model.generate(ids, max_new_tokens=4, seed=1, **callbacks)
    assert len(seen) == 4 + 4 + 6
    assert all(torch.equal(z, want) for z in seen)
    if fused:  # torch's own generator, which the inner calls seed, draws the others
        assert torch.equal(got, quiet)


def test_lazy_logits_are_the_logits():
    """What a hook finds is what the embedding would have made, through views, copies and changes in
    place."""
    model, ids = tiny_model("llama"), prompts()
    head, found = tiny_head(model), []

    def hook(_, args, output):
        z = output.logits
        last, copied = z[:, -1], z[:, -1, :].to(torch.float32, copy=True)
        before = copied.clone()
        z[:, :, 5] = 123.0
        assert (last[:, 5] == 123.0).all()
        assert torch.equal(copied, before)
        z[:, :, 5] = before[:, None, 5]
        found.append((z.numpy().copy(), z.sum().item(), z.tolist(), copy.deepcopy(z), f"{z}"))

    z, T = logits_and_temperature(model, head, ids)
    with attach(model, head) as attachment, model.register_forward_hook(hook):
        assert attachment.lazy
        model.generate(ids, max_new_tokens=1, seed=0)
    array, total, nested, copied, printed = found[0]
    torch.testing.assert_close(
        torch.from_numpy(array)[:, -1].double(), z / T[:, None], rtol=1e-5, atol=1e-6
    )
    assert total == pytest.approx(array.sum(), rel=1e-5)
    assert torch.equal(torch.tensor(nested), torch.from_numpy(array))
    assert torch.equal(copied, torch.from_numpy(array))
    assert printed.startswith("tensor(")


def test_a_cap_of_any_name_is_found():
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        hidden_size=32,
        lru_width=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=VOCAB,
        logits_soft_cap=2.0,
        attention_window_size=16,
        pad_token_id=0,
    )
    model = RecurrentGemma(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    model.generation_config = GenerationConfig(pad_token_id=0)
    head, ids = tiny_head(model), prompts(1)
    z, T = logits_and_temperature(model, head, ids)
    for fused in (True, False):
        seen = []

        def look(input_ids, scores, seen=seen):
            seen.append(scores)
            return scores

        with attach(model, head, fused=fused):
            model.generate(ids, max_new_tokens=1, logits_processor=[look])
        torch.testing.assert_close(seen[0].double(), z / T[:, None], rtol=1e-4, atol=1e-5)


def test_a_model_that_goes_around_its_embedding_is_refused():
    model, ids = tiny_model("llama"), prompts()

    class Around(type(model)):
        def forward(self, *args, **kwargs):
            kwargs.pop("logits_to_keep", None)
            output = self.model(*args, **kwargs)
            output["logits"] = torch.nn.functional.linear(
                output.last_hidden_state, self.lm_head.weight
            )
            return output

    plain = type(model)
    model.__class__ = Around
    for fused in (True, False):
        with pytest.raises(ValueError, match="output embedding"):
            attach(model, tiny_head(model), fused=fused)
        assert type(model) is Around
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.__class__ = plain
    with attach(model, tiny_head(model)):
        model.forward = functools.partial(Around.forward, model)
        with pytest.raises(ValueError, match="output embedding"):
            model.generate(ids, max_new_tokens=2)


def test_two_models_share_an_embedding():
    a, b, ids = tiny_model("llama"), tiny_model("llama"), prompts()
    with torch.no_grad():
        for p in b.model.parameters():
            p.mul_(1.3)
    b.lm_head = a.lm_head
    heads = tiny_head(a), tiny_head(a, seed=9)

    def run(model):
        return model.generate(ids, max_new_tokens=6, seed=3)

    with attach(a, heads[0]):
        want_a = run(a)
    with attach(b, heads[1]):
        want_b = run(b)
    first, second = attach(a, heads[0]), attach(b, heads[1])
    assert torch.equal(run(a), want_a)
    assert torch.equal(run(b), want_b)
    first.detach()
    assert torch.equal(run(b), want_b)
    second.detach()
    assert "forward" not in vars(a.lm_head)
    assert not any((a.lm_head._forward_hooks, a.lm_head._forward_pre_hooks))
