"""Heads without a flag: in the base's folder, and in merged AutoDeco checkpoints."""

import shutil

import pytest
import torch

from autodeco_fast.autodeco import convert
from tests_vllm import models, reference
from tests_vllm.engines import call, engine
from tests_vllm.test_log_probs import DRAWS, check


def test_a_head_in_the_models_folder_needs_no_flag(llama, head_folder, tmp_path):
    shutil.copytree(llama, tmp_path / "both")
    for path in head_folder.iterdir():
        shutil.copy(path, tmp_path / "both")
    prompts = models.prompts(4)
    done = engine(tmp_path / "both", [call(prompts, **DRAWS)])
    check("llama", done[0], prompts)


def merged(folder, base, *, top_p: bool):
    """A merged checkpoint, as AutoDeco's script makes one."""
    models.head(min_p=None).save_pretrained(folder / "head")
    second = None
    if top_p:
        second = folder / "second"
        models.top_p_head().save_pretrained(second)
    convert.construct(
        str(base),
        folder / "heads",
        head=str(folder / "head"),
        top_p_head=second and str(second),
    )
    convert.merge(str(base), str(folder / "heads"), folder / "merged")
    return folder / "merged"


@pytest.mark.parametrize(
    "family, shim", [("qwen2", None), ("llama", "v2")], ids=["V1 runner", "V2 runner"]
)
def test_a_merged_checkpoint_draws_with_both_heads(family, shim, folder_of, tmp_path):
    folder = merged(tmp_path, folder_of(family), top_p=True)
    prompts, asked = models.prompts(4), [{}, {"temperature": 0.7}, {}, {"temperature": 0.0}]
    params = [{"max_tokens": 8, "logprobs": -1, **each} for each in asked]
    params[2]["extra_args"] = {"autodeco": 0}
    done = engine(folder, [call(prompts, *params)], shim=shim, logprobs_mode="processed_logprobs")
    model, head, second = models.model(family), models.head(), models.top_p_head()
    cuts = []
    for answer, prompt, given in zip(done[0], prompts, params, strict=True):
        seen = reference.rows(model, prompt, answer["tokens"])
        T = reference.temperatures(head, seen.hidden)
        z = seen.logits.float()
        with torch.no_grad():
            top_p = second(seen.hidden.float(), T.float(), second.features(z, T.float()))
        if given.get("temperature") == 0:
            assert answer["tokens"] == seen.logits.argmax(1).tolist()
            continue
        if "extra_args" in given:
            T, top_p = torch.ones_like(T), torch.ones_like(top_p)
        for n in range(len(T)):
            at = float(T[n]) * given.get("temperature", 1.0)
            expected = reference.drawn_from(seen.logits[n], at, top_p=float(top_p[n]))
            expected.assert_equals(answer["logprobs"][n], at)
            cuts.append(int(expected.log_probs.isinf().sum()))
    assert min(cuts) == 0
    assert max(cuts) > models.VOCAB // 2


def test_a_merged_checkpoint_with_one_head_and_the_switch(folder_of, tmp_path):
    folder, prompts = merged(tmp_path, folder_of("llama"), top_p=False), models.prompts(4)
    done = engine(folder, [call(prompts, **DRAWS)])
    model, head = models.model("llama"), models.head()
    for answer, prompt in zip(done[0], prompts):
        seen = reference.rows(model, prompt, answer["tokens"])
        T = reference.temperatures(head, seen.hidden)
        reference.assert_log_probs(answer["logprobs"], seen.logits, T, models.MIN_P)
    off = engine(folder, [call(prompts, **DRAWS)], env={"AUTODECO_FAST_VLLM": "0"})
    for answer, prompt in zip(off[0], prompts):
        seen = reference.rows(model, prompt, answer["tokens"])
        reference.assert_log_probs(
            answer["logprobs"], seen.logits, torch.ones(len(seen.logits)), models.MIN_P
        )
    assert off.log.count("is not used: AUTODECO_FAST_VLLM=0") == 1
