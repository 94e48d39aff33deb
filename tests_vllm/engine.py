"""One engine: reads a job from a file, answers into another.

    python -m tests_vllm.engine JOB ANSWER

A job is `{"options": …of LLM, "calls": [{"prompts": [ids, …], "params": [{…of SamplingParams}, …]},
…], "shim": null, "v1" or "v2", "beside": null}`; the answer has, for every call and request, its
tokens and at every position the log-probability of each id. `beside` has what differs of the
options of a second engine, which is made before the first one answers.
"""

import json
import sys
from pathlib import Path


def answer(job: dict) -> list:
    if job["shim"]:
        from tests_vllm import triton_on_cpu

        triton_on_cpu.install(job["shim"])
    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError

    llm = LLM(**job["options"])
    beside = LLM(**job["options"] | job["beside"]) if job["beside"] else None
    answers = []
    for call in job["calls"]:
        prompts = [{"prompt_token_ids": ids} for ids in call["prompts"]]
        try:
            params = [SamplingParams(**each) for each in call["params"]]
            done = llm.generate(prompts, params, use_tqdm=False)
        except (ValueError, VLLMValidationError) as error:
            answers.append({"error": str(error)})
            continue
        answers.append([_completion(each.outputs[0]) for each in done])
    if job.get("inspect"):
        answers += llm.collective_rpc(_inspect)
    del beside  # it lived until here
    return answers


def _completion(output) -> dict:
    logprobs = [
        {str(token): entry.logprob for token, entry in position.items()}
        for position in output.logprobs or []
    ]
    return {"tokens": list(output.token_ids), "logprobs": logprobs}


def _inspect(worker) -> dict:
    runner = worker.model_runner
    sampler = getattr(runner, "sampler", None)
    return {
        "model": type(runner.get_model()).__name__,
        "runner": type(runner).__module__,
        "sampler": type(sampler).__name__,
        "draws": getattr(sampler, "fused_draws", None),
    }


if __name__ == "__main__":
    answered = answer(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answered))
