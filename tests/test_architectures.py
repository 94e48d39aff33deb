"""Every causal architecture of transformers: its tokens, what heads read, what detaching leaves."""

import math
from importlib.util import find_spec

import pytest
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

from autodeco_fast import TemperatureHead, attach, sample
from autodeco_fast.training import base_model
from tests.architectures import (
    CANNOT,
    LEFT_OUT,
    NAMES,
    UNATTACHED,
    UNCACHED,
    UNTRAINED,
    build,
    prompts,
    seen,
    spread_head,
)

pytestmark = pytest.mark.slow
MIN_P, SEED, NEW = 0.1, 7, 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """What threads would share of models this small costs less than waking them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=NAMES)
def name(request, one_thread) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name):
    """Built once for all tests of this file."""
    model = build(name)
    # Whatever transformers leaves on a model by itself is there already.
    model.generate(prompts(), max_new_tokens=2, do_sample=True, **UNCACHED.get(name, {}))
    return model


@pytest.fixture(scope="module")
def head(model):
    return spread_head(model)


def generate(name, model, new: int = NEW, **kwargs) -> torch.Tensor:
    ids = prompts()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "seed": SEED}
    return model.generate(ids, **options, **UNCACHED.get(name, {}), **kwargs)


@torch.no_grad()
def logits_and_temperature(model, head, ids) -> tuple[torch.Tensor, torch.Tensor]:
    """The last position's, `[B, V]` and `[B]`, by hand from a whole forward."""
    h, z = seen(model, ids)
    return z[:, -1].float(), head(h[:, -1])


def sampled_by_hand(model, head) -> tuple[torch.Tensor, bool]:
    """The tokens, and whether T = 1 would have given others."""
    ids, others = prompts(), False
    for _ in range(NEW):
        z, T = logits_and_temperature(model, head, ids)
        options = {"min_p": MIN_P, "seed": SEED, "position": ids.shape[1]}
        token = sample(z, T, **options).token
        others |= not torch.equal(token, sample(z, 1.0, **options).token)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids, others


def test_tokens_are_those_of_a_loop_by_hand(name, model, head):
    _, T = logits_and_temperature(model, head, prompts())
    assert T.max() > 1.5 * T.min()
    with attach(model, head, min_p=MIN_P):
        got = generate(name, model)
    want, others = sampled_by_hand(model, head)
    assert torch.equal(got, want)
    assert others  # the test can tell


def test_processors_see_the_logits_over_the_temperature(name, model, head):
    steps = []

    class Spy(LogitsProcessor):
        def __call__(self, input_ids, scores):
            steps.append((input_ids.clone(), scores.clone()))
            return scores

    with attach(model, head, min_p=MIN_P, fused=False):
        got = generate(name, model, logits_processor=LogitsProcessorList([Spy()]))
    assert len(steps) == NEW
    for ids, scores in steps:
        z, T = logits_and_temperature(model, head, ids)
        want = z / T[:, None]
        # A cached step rounds otherwise than a whole forward: by up to 2e-5 of the largest here.
        assert (scores - want).abs().max() < 1e-4 * want.abs().max()
        token = want.gather(1, got[:, ids.shape[1], None])[:, 0]
        assert (token > want.amax(1) + math.log(MIN_P) - 1e-3).all()


def test_training_reads_the_h_that_generate_reads(name, model):
    """What a forward gives at a position is what enters the output embedding after its prefix."""
    ids, refused = prompts()[:1], None
    try:
        base = base_model.wrap(model)
        base.verify(ids)
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert name in UNTRAINED, refused
        assert "\n" not in refused
        return
    hidden = base.hidden(ids)
    for length in range(1, ids.shape[1] + 1):
        if (length, name) == (1, "recurrent_gemma") and transformers.__version__.startswith("5.0."):
            continue  # it cannot be run on one token there
        h, z = seen(model, ids[:, :length])
        torch.testing.assert_close(hidden[:, length - 1], h[:, -1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(base.logits(h[0, -1:]), z[0, -1:].float(), rtol=1e-4, atol=1e-4)


def state(model) -> dict:
    """All that an attachment touches, or could, but for weights."""
    hooks = {
        path: {
            key: list(value)
            for key, value in vars(module).items()
            if key.endswith("_hooks") and value
        }
        for path, module in model.named_modules()
    }
    return {
        "class": type(model),
        "attributes": set(vars(model)),
        "attributes of the output embedding": set(vars(model.get_output_embeddings())),
        "hooks": {path: found for path, found in hooks.items() if found},
        "generation_config": model.generation_config.to_dict(),
    }


@pytest.mark.parametrize("fused", [True, False])
def test_detaching_restores_the_model(name, model, head, fused):
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    _, z = seen(model, prompts())
    with attach(model, head, fused=fused):
        assert state(model) != before
        generate(name, model, new=2)  # the prompt, and a step from the cache
    assert state(model) == before
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in after.items())
    assert torch.equal(seen(model, prompts())[1], z)


@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_what_is_left_out_cannot_continue_ids(left_out):
    why, words = CANNOT[left_out]
    if left_out == "gemma3n" and find_spec("timm"):
        pytest.skip(f"{why}, which is installed here: it would be built at full size")
    with pytest.raises(Exception, match=words):
        build(left_out).generate(prompts(), max_new_tokens=2, do_sample=True)


@pytest.mark.parametrize("unattached", UNATTACHED)
def test_what_attach_refuses(unattached):
    _, words = UNATTACHED[unattached]
    model = build(unattached)
    with pytest.raises(ValueError, match=words):
        attach(model, TemperatureHead(32))
