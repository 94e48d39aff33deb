"""Engines in processes of their own, from a test's side."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# One process, few threads, a small cache: several engines run beside each other.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
}
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 128,
    "max_num_seqs": 16,
    "max_logprobs": -1,
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
    "disable_log_stats": True,
}


def environment(**added: str) -> dict[str, str]:
    left = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return {**left, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **added}


class Finished:
    """An engine that has answered, or died."""

    def __init__(self, answers: list | None, log: str):
        self.answers, self.log = answers, log

    def __getitem__(self, call: int) -> Any:
        assert self.answers is not None, self.log[-6000:]
        return self.answers[call]


def engine(
    model: Path,
    calls: list[dict],
    *,
    head: Path | None = None,
    config: dict | None = None,
    shim: str | None = None,
    inspect: bool = False,
    beside: dict | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 400,
    **options: Any,
) -> Finished:
    """Runs calls on one engine; `beside` are the options of another one in its process."""
    additional = dict(config or {})
    if head is not None:
        additional["autodeco_head"] = str(head)
    options = {**OPTIONS, "model": str(model), "additional_config": additional, **options}
    job = {"options": options, "calls": calls, "shim": shim, "inspect": inspect, "beside": beside}
    with tempfile.TemporaryDirectory() as made:
        asked, answered = Path(made) / "job.json", Path(made) / "answer.json"
        asked.write_text(json.dumps(job))
        done = subprocess.run(
            [sys.executable, "-m", "tests_vllm.engine", str(asked), str(answered)],
            cwd=ROOT,
            env=environment(**(env or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        answers = json.loads(answered.read_text()) if answered.exists() else None
    assert (done.returncode == 0) == (answers is not None), done.stdout[-6000:]
    return Finished(answers, done.stdout)


def call(prompts: list[list[int]], *params: dict, **shared: Any) -> dict:
    """Requests: one set of parameters for all prompts, or one each."""
    each = [{**shared, **given} for given in (params or ({},))]
    return {"prompts": prompts, "params": each * (len(prompts) // len(each))}
