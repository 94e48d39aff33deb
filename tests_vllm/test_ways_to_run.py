"""Two tensor-parallel ranks, speculation, and servers that must not start."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

from tests_vllm import models, reference
from tests_vllm.engines import ROOT, call, engine, environment
from tests_vllm.test_log_probs import DRAWS, check

# Of a few words again and again, so that n-grams are found.
REPEATING = [[5, 6, 7, 8] * 4, [9, 10] * 8, [20, 21, 22] * 5, [30] * 12]
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 2,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


def test_two_tensor_parallel_ranks(llama, head_folder):
    prompts = models.prompts(4)
    done = engine(
        llama,
        [call(prompts, **DRAWS)],
        head=head_folder,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    check("llama", done[0], prompts)


def test_a_second_engine_of_a_process_leaves_the_first_its_cut(llama, head_folder, tmp_path):
    models.head().save_pretrained(tmp_path / "head")
    config, prompts = {"autodeco_head": str(tmp_path / "head")}, models.prompts(4)
    beside = {"additional_config": config}
    done = engine(llama, [call(prompts, **DRAWS)], head=head_folder, beside=beside)
    check("llama", done[0], prompts)


ALLOWED = [3, 40, 77, 100]


@pytest.mark.parametrize("shim", ["v1", "v2"])
def test_ngram_speculation_draws_from_the_kept_set(shim, llama, head_folder):
    asked = [{}] * 4
    if shim == "v2":  # V1 builds no logits processors then
        own = [{"autodeco_min_p": 0.4}, {"autodeco": 0}]
        asked = [{}, {"temperature": 0.7}, *({"extra_args": each} for each in own)]
    calls = [
        call(REPEATING, *({**DRAWS, **each} for each in asked)),
        call(REPEATING[:1], min_p=0.1),
        call(REPEATING, max_tokens=6, allowed_token_ids=ALLOWED),
        call(REPEATING, max_tokens=6, allowed_token_ids=ALLOWED, temperature=0.0),
    ]
    # V1 cuts before the logits that raw log-probabilities are of.
    mode = "processed_logprobs" if shim == "v2" else "raw_logprobs"
    done = engine(
        llama,
        calls,
        head=head_folder,
        shim=shim,
        inspect=True,
        speculative_config=NGRAM,
        logprobs_mode=mode,
    )
    assert done[-1]["runner"].endswith(".model_runner") == (shim == "v2")
    for prompt, answer, each in zip(REPEATING, done[0], asked, strict=True):
        z, T = logits_and_temperatures(prompt, answer)
        extra, t = each.get("extra_args", {}), each.get("temperature", 1.0)
        min_p = extra.get("autodeco_min_p", models.MIN_P)
        if "autodeco" in extra:
            T, min_p = torch.ones_like(T), 0.0
        else:
            reference.assert_drawn_inside(z, answer["tokens"], t * T, min_p)
        for n, token in enumerate(answer["tokens"]):
            expected = reference.drawn_from(z[n], t * float(T[n]), min_p=min_p)
            expected.assert_equals(answer["logprobs"][n], t * float(T[n]))
            assert expected.log_probs[token].isfinite() or expected.doubtful[token]
    assert "not yet supported with speculative decoding" in done[1]["error"]
    least = math.inf
    for prompt, drawn, greedy in zip(REPEATING, done[2], done[3], strict=True):
        assert set(drawn["tokens"]) <= set(ALLOWED)
        z, T = logits_and_temperatures(prompt, drawn)
        below = (z[:, ALLOWED].amax(1) - reference.cut(z, T, models.MIN_P)).min()
        least = min(least, float(below))
        z, _ = logits_and_temperatures(prompt, greedy)
        assert greedy["tokens"] == [ALLOWED[i] for i in z[:, ALLOWED].argmax(1)]
    assert least < 0  # rows of whose kept set the list leaves nothing


def logits_and_temperatures(prompt: list[int], answer: dict) -> tuple[torch.Tensor, torch.Tensor]:
    seen = reference.rows(models.model("llama"), prompt, answer["tokens"])
    return seen.logits, reference.temperatures(models.head(), seen.hidden)


def refused(*args, **options) -> str:
    """The log of an engine that did not start."""
    done = engine(*args, calls=[], **options)
    assert done.answers is None
    return done.log


def test_a_head_of_another_width(llama, tmp_path):
    models.head(width=32).save_pretrained(tmp_path / "head")
    log = refused(llama, head=tmp_path / "head")
    assert "the head reads hidden states of width 32, the model's have 64" in log


def test_an_unknown_key(llama, head_folder):
    log = refused(llama, head=head_folder, config={"autodeco_tempreature": 1})
    assert "autodeco_sampler, got 'autodeco_tempreature'" in log


def test_a_plugin_that_is_left_out(llama, head_folder):
    log = refused(llama, head=head_folder, env={"VLLM_PLUGINS": "others"})
    assert "the plugin autodeco_fast was not loaded: VLLM_PLUGINS must name it too" in log


def test_our_sampler_needs_the_v2_runner(llama, head_folder):
    log = refused(llama, head=head_folder, config={"autodeco_sampler": "fused"})
    assert "autodeco_sampler must be vllm with vLLM's V1 runner" in log


def test_without_a_head_and_with_the_models_own_settings(llama, head_folder, tmp_path):
    """Plain decoding is vLLM's; a model's generation_config that cuts beside the head is told."""
    (prompt,) = models.prompts(1)
    plain = engine(llama, [call([prompt], {"extra_args": {"t_scale": 0.5}}, **DRAWS)])
    seen = reference.rows(models.model("llama"), prompt, plain[0][0]["tokens"])
    ones = torch.ones(len(seen.logits))
    reference.assert_log_probs(plain[0][0]["logprobs"], seen.logits, ones, models.MIN_P)
    assert "Requests ask for adaptive decoding; this server has no head" in plain.log
    shutil.copytree(llama, tmp_path / "model")
    logged = {"top_k": 5, "max_tokens": 3, "extra_args": {"autodeco_log": "x"}}
    full = {"autodeco_log": "/dev/full"}
    done = engine(tmp_path / "model", [call([prompt], logged)], head=head_folder, config=full)
    assert "A request's top_k 5 and top_p 1 cut beside the head" in done.log
    assert len(done[0][0]["tokens"]) == 3
    assert done.log.count("autodeco_log /dev/full cannot be written: [Errno 28]") == 1


def test_the_benchmark_runs(tmp_path):
    words = ["-m", "bench.end_to_end.serving", "--tiny", "--output", str(tmp_path / "draft")]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results = json.loads((tmp_path / "draft").read_text())["benchmarks"]
    assert len({each["fullname"] for each in results}) == len(results) == 6
    assert all(each["stats"]["median"] > 0 for each in results)
