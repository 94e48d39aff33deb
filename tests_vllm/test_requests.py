"""What requests ask for: the distribution that each token was drawn from, in one mixed batch, for
both of vLLM's runners."""

import json

import pytest
import torch

from autodeco_fast import sample
from tests_vllm import models, reference
from tests_vllm.engines import call, engine

OFFSET = 0.15  # of calibration
ASKED = {
    "nothing": {},
    "temperature": {"temperature": 0.7},
    "opted out": {"extra_args": {"autodeco": False}},
    "opted out, own temperature and cut": {
        "extra_args": {"autodeco": 0},
        "temperature": 0.8,
        "min_p": 0.2,
    },
    "factor": {"extra_args": {"t_scale": 0.5}},
    "range": {"extra_args": {"t_min": 0.6, "t_max": 0.7}, "temperature": 1.3},
    "own Min-P": {"min_p": 0.02},
    "no cut": {"extra_args": {"autodeco_min_p": 0}},
    "own cut here": {"extra_args": {"autodeco_min_p": 0.4}, "temperature": 1.5},
    "penalties": {"frequency_penalty": 2.0, "temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "greedy, opted out": {"temperature": 0.0, "extra_args": {"autodeco": 0}},
    "logged": {"extra_args": {"autodeco_log": "a.b-1", "t_scale": 1.25}},
}
BAD = [
    ({"extra_args": {"t_scale": -1.0}}, "t_scale must be positive, got -1.0"),
    ({"extra_args": {"autodeco": 2}}, "autodeco must be 0 or 1, got 2"),
    ({"extra_args": {"autodeco_typo": 1}}, "vllm_xargs are autodeco, t_scale"),
    ({"extra_args": {"t_min": 1.0, "t_max": 0.5}}, "t_max must be ≥ t_min 1.0, got 0.5"),
    ({"extra_args": {"autodeco_min_p": 0.1}, "min_p": 0.2}, "are the same cut"),
    ({"extra_args": {"autodeco_log": "x"}, "n": 2}, "names one completion, got n 2"),
]


def wanted(asked: dict, T: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """T of the request's rows, its own temperature and its Min-P, by the documentation."""
    extra = asked.get("extra_args", {})
    t, min_p = asked.get("temperature", 1.0), asked.get("min_p", 0.0)
    if not extra.get("autodeco", True):
        return torch.ones_like(T), t, min_p
    T = (T * extra.get("t_scale", 1.0)).clamp(extra.get("t_min", 0.0), extra.get("t_max"))
    return T, t, extra.get("autodeco_min_p", min_p or models.MIN_P)


@pytest.fixture(scope="module")
def offset_head(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offset") / "head"
    models.head(offset=OFFSET).save_pretrained(folder)
    return folder


def check(done: dict, prompt: list[int], asked: dict) -> torch.Tensor:
    """Every reported distribution is the documented one; returns T as it was used."""
    seen = reference.rows(models.model("llama"), prompt, done["tokens"])
    T, t, min_p = wanted(asked, reference.temperatures(models.head(offset=OFFSET), seen.hidden))
    if t == 0:
        assert done["tokens"] == seen.logits.argmax(1).tolist()
        return T
    for n, token in enumerate(done["tokens"]):
        at = float(T[n]) * t
        times = torch.bincount(torch.tensor(done["tokens"][:n]).long(), minlength=models.VOCAB)
        penalised = seen.logits[n] - asked.get("frequency_penalty", 0.0) * float(T[n]) * times
        expected = reference.drawn_from(penalised, at, min_p=min_p)
        assert expected.log_probs[token].isfinite() or expected.doubtful[token]
        expected.assert_equals(done["logprobs"][n], at)
    return T


@pytest.mark.parametrize("shim", [None, "v2"])
def test_a_mixed_batch_draws_from_what_each_request_asked(shim, llama, offset_head, tmp_path):
    prompts, log = models.prompts(len(ASKED)), tmp_path / "log.jsonl"
    params = [{"max_tokens": 8, "logprobs": -1, **asked} for asked in ASKED.values()]
    calls = [call(prompts, *params), *(call(prompts[:1], bad) for bad, _ in BAD)]
    done = engine(
        llama,
        calls,
        head=offset_head,
        config={"autodeco_log": str(log)},
        shim=shim,
        inspect=True,
        logprobs_mode="processed_logprobs",
    )
    assert done[-1]["runner"].endswith(".model_runner") == (shim == "v2")
    assert done[-1]["model"] == "LlamaForCausalLM"
    used = {
        name: check(answer, prompt, asked)
        for answer, prompt, (name, asked) in zip(done[0], prompts, ASKED.items(), strict=True)
    }
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["id"] for line in lines} == {"a.b-1"}
    assert [line["index"] for line in lines] == list(range(8))
    logged = torch.tensor([line["temperature"] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(logged, used["logged"], rtol=0, atol=2e-5)
    for answer, (_, complaint) in zip(done.answers[1:-1], BAD, strict=True):
        assert complaint in answer["error"]
        assert "\n" not in answer["error"]
    assert done.log.count("is not the 0.1 that the head was made for") == 2


def test_a_prompt_in_steps_is_logged_from_its_first_new_token(llama, head_folder, tmp_path):
    (prompt,), log = models.prompts(1, length=40), tmp_path / "log.jsonl"
    done = engine(
        llama,
        [call([prompt], max_tokens=3, extra_args={"autodeco_log": "long"})],
        head=head_folder,
        config={"autodeco_log": str(log)},
        shim="v2",
        max_num_batched_tokens=16,
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    seen = reference.rows(models.model("llama"), prompt, done[0][0]["tokens"])
    expected = reference.temperatures(models.head(), seen.hidden)
    logged = torch.tensor([line["temperature"] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(logged, expected, rtol=0, atol=2e-5)


def test_our_sampler_draws_its_own_tokens(llama, offset_head):
    """Token for token those of `sample` on transformers' logits over T."""
    asked = [{}, {"temperature": 0.7}, {"min_p": 0.02}, {"temperature": 0.0}]
    prompts = models.prompts(len(asked))
    params = [{"max_tokens": 8, "seed": 11 + i, **each} for i, each in enumerate(asked)]
    others = [{**params[0], "repetition_penalty": 1.2}, params[1]]
    done = engine(
        llama,
        [call(prompts, *params), call(prompts[:2], *others)],
        head=offset_head,
        config={"autodeco_sampler": "fused"},
        shim="v2",
        inspect=True,
    )
    assert done[-1]["sampler"] == "FusedSampler"
    assert done[-1]["draws"] == 8
    model, head = models.model("llama"), models.head(offset=OFFSET)
    for answer, prompt, given in zip(done[0], prompts, params):
        seen = reference.rows(model, prompt, answer["tokens"])
        T, t, min_p = wanted(given, reference.temperatures(head, seen.hidden))
        positions = torch.arange(len(answer["tokens"])) + len(prompt) - 1
        drawn = sample(
            (seen.logits / T[:, None]).float(),
            t,
            min_p=min_p if t else 0.0,
            seed=torch.full((len(T),), given["seed"]),
            position=positions,
        )
        assert answer["tokens"] == drawn.token.tolist()
    for answer, prompt in zip(done[1], prompts):
        seen = reference.rows(model, prompt, answer["tokens"])
        T = reference.temperatures(head, seen.hidden)
        if prompt == prompts[1]:  # vLLM's sampler draws it, the cut is still the head's
            reference.assert_drawn_inside(seen.logits, answer["tokens"], T * 0.7, models.MIN_P)
