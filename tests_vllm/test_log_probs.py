"""Log-probabilities against transformers, and what is drawn, for architectures and ways to run."""

import pytest

from tests_vllm import models, reference
from tests_vllm.engines import call, engine

DRAWS = {"temperature": 1.0, "max_tokens": 10, "logprobs": -1}


def check(family: str, answers: list[dict], prompts: list[list[int]], head=None) -> None:
    """Tokens and log-probabilities of requests that ask for nothing of their own."""
    model, head = models.model(family), head or models.head()
    for prompt, done in zip(prompts, answers, strict=True):
        seen = reference.rows(model, prompt, done["tokens"])
        T = reference.temperatures(head, seen.hidden)
        assert T.std() > 0.1 * T.mean()
        reference.assert_log_probs(done["logprobs"], seen.logits, T, models.MIN_P)
        reference.assert_drawn_inside(seen.logits, done["tokens"], T, models.MIN_P)


WAYS = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma2, softcap": ("gemma2", {}),
    "granite, scale": ("granite", {}),
    "gpt_oss": ("gpt_oss", {}),
    "transformers backend": ("llama", {"model_impl": "transformers"}),
    "compiled": ("llama", {"enforce_eager": False}),
    "chunked prefill and prefix cache": (
        "llama",
        {"max_num_batched_tokens": 16, "enable_prefix_caching": True, "max_num_seqs": 4},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_log_probs_are_those_of_transformers_with_the_head(way, folder_of, head_folder):
    family, options = WAYS[way]
    prompts = models.prompts(4, length=40 if "chunked" in way else 6)
    calls = [call(prompts, **DRAWS)] * (2 if "cache" in way else 1)
    done = engine(folder_of(family), calls, head=head_folder, inspect=True, **options)
    for n in range(len(calls)):
        check(family, done[n], prompts)
    assert f"Adaptive decoding with head {head_folder}" in done.log
