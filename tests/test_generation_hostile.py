"""`attach` among hooks, patches, callbacks, copies and broken rows: nothing is silently wrong."""

import copy
import functools
import io
import pickle

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, RecurrentGemmaConfig, StoppingCriteria
from transformers import RecurrentGemmaForCausalLM as RecurrentGemma
from transformers.generation.streamers import BaseStreamer

from autodeco_fast import TemperatureHead, attach, detach
from tests.tiny_models import (
    NAMES,
    VOCAB,
    draws,
    logits_and_temperature,
    prompts,
    tiny_head,
    tiny_model,
)

every_model = pytest.mark.parametrize("name", NAMES)
both_paths = pytest.mark.parametrize("fused", [True, False])


def ban(logits: torch.Tensor, allowed: int) -> torch.Tensor:
    """Leaves one token, in place."""
    assert logits.shape[-1] == VOCAB
    keep = logits[..., allowed].clone()
    logits[...] = float("-inf")
    logits[..., allowed] = keep
    return logits


# Others that look at the logits


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


# Models that transform their logits, or go around their output embedding


def test_a_cap_of_any_name_is_found():
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        hidden_size=32, lru_width=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, vocab_size=VOCAB, logits_soft_cap=2.0, attention_window_size=16, pad_token_id=0,
    )  # fmt: skip
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


# Broken rows


@both_paths
@pytest.mark.parametrize("broken", ["a NaN", "everything masked", "a head of NaN"])
def test_rows_that_cannot_be_sampled_raise(fused, broken):
    model, ids = tiny_model("llama"), prompts(3)
    head = tiny_head(model)

    def spoil(input_ids, scores):
        scores = scores.clone()
        scores[1] = float("nan") if broken == "a NaN" else float("-inf")
        return scores

    processors = [spoil]
    if broken == "a head of NaN":
        processors = []
        with torch.no_grad():
            head.mlp[2].bias.fill_(float("nan"))
    with attach(model, head, fused=fused), pytest.raises(RuntimeError) as error:
        model.generate(ids, max_new_tokens=3, seed=0, logits_processor=processors)
    if fused:
        assert "row 1" in str(error.value) or broken == "a head of NaN"


def test_nan_without_logits_raises():
    model, ids = tiny_model("llama"), prompts(2)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with attach(model, tiny_head(model)) as attachment:
        assert attachment.lazy
        with pytest.raises(RuntimeError, match=r"row 0.*NaN"):
            model.generate(ids, max_new_tokens=3, seed=0)


# Copies, pickles, folders


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
            file = io.BytesIO()
            torch.save(model, file)
            assert b"autodeco" not in file.getvalue()
            file.seek(0)
            got = torch.load(file, weights_only=False)
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


def _counting(module, args, output):
    """Somebody's own hook, which copies keep."""


def test_an_attached_model_saves_as_if_it_were_not(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "plain")
    with attach(model, tiny_head(model)):
        model.generate(prompts(), max_new_tokens=2)
        model.save_pretrained(tmp_path / "attached")
    for file in sorted((tmp_path / "plain").iterdir()):
        assert (tmp_path / "attached" / file.name).read_bytes() == file.read_bytes(), file.name


# What a call says


SPELLED_OUT = dict(
    num_beams=1, length_penalty=1.0, repetition_penalty=1.0, early_stopping=False, do_sample=True, top_k=0, top_p=1.0,
    temperature=1.0, typical_p=1.0, epsilon_cutoff=0.0, eta_cutoff=0.0, num_return_sequences=1, max_new_tokens=6,
)  # fmt: skip


@both_paths
def test_a_configuration_that_says_everything_is_honoured(fused):
    model, ids = tiny_model("llama"), prompts()
    head = tiny_head(model)

    def run(**settings):
        config = GenerationConfig(**{**SPELLED_OUT, **settings})
        return model.generate(ids, generation_config=config, seed=2)

    greedy = model.generate(ids, do_sample=False, max_new_tokens=6)
    with attach(model, head, fused=fused):
        plain = model.generate(ids, max_new_tokens=6, seed=2)
        assert torch.equal(run(), plain)
        assert torch.equal(run(do_sample=False), greedy)
        assert torch.equal(
            run(temperature=0.7), model.generate(ids, max_new_tokens=6, temperature=0.7, seed=2)
        )
        assert torch.equal(run(top_k=50), model.generate(ids, max_new_tokens=6, top_k=50, seed=2))
        assert torch.equal(run(top_k=1), greedy)
        assert not torch.equal(run(temperature=0.7), plain)


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


def test_the_head_knows_its_min_p():
    model = tiny_model("llama")
    head, ids = tiny_head(model), prompts()
    head.min_p = 0.6
    with attach(model, head):
        own = model.generate(ids, max_new_tokens=12, seed=0)
        with pytest.warns(UserWarning, match=r"min_p=0\.2.*0\.6"):
            model.generate(ids, max_new_tokens=2, min_p=0.2)
    with pytest.warns(UserWarning, match=r"min_p=0\.1.*0\.6"):
        attachment = attach(model, head, min_p=0.1)
    assert not torch.equal(model.generate(ids, max_new_tokens=12, seed=0), own)
    attachment.detach()
    head.min_p = None
    with attach(model, head, min_p=0.6):
        assert torch.equal(model.generate(ids, max_new_tokens=12, seed=0), own)
    with attach(model, head) as attachment:
        assert attachment.min_p == 0.1
    for wrong in (float("nan"), 2, "0.1"):
        with pytest.raises(ValueError, match="min_p"):
            attach(model, head, min_p=wrong)


# Seeds and streams


def test_a_prompt_with_a_seed_of_its_own_is_the_same_in_any_batch():
    model, ids = tiny_model("llama"), prompts(3)
    with attach(model, tiny_head(model)):

        def run(ids, **noise):
            return model.generate(ids, max_new_tokens=8, **noise)

        together = run(ids, seed=[5, 6, 7])
        for row in range(3):
            assert torch.equal(run(ids[row : row + 1], seed=[5 + row])[0], together[row])
        several = run(ids, seed=torch.tensor([5, 6, 7]), num_return_sequences=4)
        assert torch.equal(several[::4], together)
        assert len(several[:4].unique(dim=0)) > 1
        assert torch.equal(run(ids[1:2], seed=[6], num_return_sequences=4), several[4:8])
        # Under one seed a row's noise is its number's, or that of a stream given.
        assert torch.equal(run(ids[1:2], seed=5, stream=1)[0], run(ids, seed=5)[1])
        assert torch.equal(run(ids, seed=5, stream=[0, 1, 2]), run(ids, seed=5))


@pytest.mark.parametrize(
    "noise",
    [{"seed": [1, 2]}, {"seed": 1.5}, {"seed": "x"}, {"seed": 2**64}, {"seed": True}, {"seed": 1, "stream": [0, 1]},
     {"seed": 1, "stream": -1}, {"seed": 1, "stream": 0.5}, {"seed": [[1, 2, 3]]}],
    ids=str,
)  # fmt: skip
@both_paths
def test_wrong_seeds_and_streams_are_refused(noise, fused):
    model, ids = tiny_model("llama"), prompts(3)
    with (
        attach(model, tiny_head(model), fused=fused),
        pytest.raises(ValueError, match=r"seed|stream"),
    ):
        model.generate(ids, max_new_tokens=2, **noise)


@pytest.mark.parametrize(
    "asked", [{"output_scores": True, "return_dict_in_generate": True}, {"top_k": 5}]
)
def test_seeds_a_prompt_need_the_fused_sampler(asked):
    model, ids = tiny_model("llama"), prompts(3)
    with attach(model, tiny_head(model)), pytest.raises(ValueError, match="fused sampler"):
        model.generate(ids, max_new_tokens=2, seed=[1, 2, 3], **asked)


@every_model
def test_a_prompt_of_embeddings_draws_as_its_ids(name):
    model, ids = tiny_model(name), prompts(2)
    embeddings = model.get_input_embeddings()(ids)
    with attach(model, tiny_head(model)):
        want = model.generate(ids, max_new_tokens=6, seed=3)[:, 5:]
        assert torch.equal(model.generate(inputs_embeds=embeddings, max_new_tokens=6, seed=3), want)
        padded = torch.cat([torch.zeros_like(embeddings[:, :2]), embeddings], 1)
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[:, :2] = 0
        got = model.generate(inputs_embeds=padded, attention_mask=mask, max_new_tokens=6, seed=3)
        assert torch.equal(got, want)


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
    assert draws(model, ids[:1], 2, do_sample=True).shape == (2,)
