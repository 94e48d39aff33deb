"""The server that docs/serving.md starts, with many clients, rude clients, and a killed engine."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch

from tests_vllm import models, reference
from tests_vllm.server import COMMANDS, Server, page_command

TOKENS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory, llama, head_folder):
    folder = tmp_path_factory.mktemp("server")
    models.save_tokenizer(llama)
    names = {"BASE": llama, "HEAD": head_folder, "LOG": folder / "temperatures.jsonl"}
    started = Server(page_command(log=True), names, folder / "server.log")
    started.temperatures = names["LOG"]
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def streamed(server: Server, prompt: list[int], **asked) -> dict:
    """Tokens and log-probabilities of what a streaming client got."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "logprobs": 128, "temperature": 1.0, **asked}
    got = {"tokens": [], "logprobs": [], "chunks": 0}
    for chunk in server.stream(body):
        (choice,) = chunk["choices"]
        got["chunks"] += 1
        entry = choice["logprobs"] or {"tokens": [], "top_logprobs": []}
        got["tokens"] += [models.token_id(token) for token in entry["tokens"]]
        got["logprobs"] += [
            {str(models.token_id(token)): value for token, value in position.items()}
            for position in entry["top_logprobs"]
        ]
    return got


def check(got: dict, prompt: list[int]) -> torch.Tensor:
    seen = reference.rows(models.model("llama"), prompt, got["tokens"])
    T = reference.temperatures(models.head(), seen.hidden)
    reference.assert_log_probs(got["logprobs"], seen.logits, T, models.MIN_P)
    reference.assert_drawn_inside(seen.logits, got["tokens"], T, models.MIN_P)
    return T


def test_the_page_has_two_commands():
    assert COMMANDS[0] == "pip install --no-deps ."
    assert page_command(log=False)[:3] == ["vllm", "serve", "BASE"]


def test_a_streaming_client_gets_adaptive_text(server):
    (prompt,) = models.prompts(1)
    got = streamed(server, prompt, vllm_xargs={"autodeco_log": "first"})
    assert got["chunks"] > 3
    T = check(got, prompt)
    lines = [json.loads(line) for line in server.temperatures.read_text().splitlines()]
    mine = {line["index"]: line["temperature"] for line in lines if line["id"] == "first"}
    logged = torch.tensor([mine[n] for n in range(len(T))], dtype=torch.float64)
    torch.testing.assert_close(logged, T, rtol=0, atol=2e-5)
    assert "Adaptive decoding with head" in server.said()


def test_32_clients_at_once(server):
    prompts = models.prompts(32, seed=5)
    with ThreadPoolExecutor(32) as pool:
        every = list(pool.map(lambda prompt: streamed(server, prompt), prompts))
    for got, prompt in zip(every, prompts, strict=True):
        check(got, prompt)


def test_clients_that_leave_are_forgotten(server):
    def leave(prompt: list[int]) -> None:
        for _ in server.stream({"prompt": prompt, "max_tokens": 120, "ignore_eos": True}):
            return  # closes the connection after the first chunk

    threads = [threading.Thread(target=leave, args=(p,)) for p in models.prompts(8, seed=6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end = time.monotonic() + 60
    while server.running():
        assert time.monotonic() < end
        time.sleep(0.2)
    (prompt,) = models.prompts(1, seed=7)
    check(streamed(server, prompt), prompt)


@pytest.mark.parametrize(
    "asked, complaint",
    [
        ({"vllm_xargs": {"t_scale": -1}}, "t_scale must be positive, got -1"),
        ({"vllm_xargs": {"autodeco": 2}}, "autodeco must be 0 or 1, got 2"),
        ({"vllm_xargs": {"autodeco_typo": 1}}, "got 'autodeco_typo'"),
        ({"vllm_xargs": {"t_min": 1, "t_max": 0.5}}, "t_max must be ≥ t_min 1.0, got 0.5"),
        ({"vllm_xargs": {"autodeco_log": "a b"}}, "autodeco_log must be 1 to 64 letters"),
        ({"vllm_xargs": {"autodeco_min_p": 0.1}, "min_p": 0.2}, "are the same cut"),
    ],
)
def test_bad_arguments_are_status_400_and_one_line(server, asked, complaint):
    answer = server.post({"prompt": [5, 6], "max_tokens": 2, **asked})
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert complaint in message
    assert "\n" not in message


def test_requests_say_otherwise(server):
    (prompt,) = models.prompts(1, seed=8)
    greedy = streamed(server, prompt, temperature=0.0)
    seen = reference.rows(models.model("llama"), prompt, greedy["tokens"])
    assert greedy["tokens"] == seen.logits.argmax(1).tolist()
    cold = streamed(server, prompt, vllm_xargs={"t_max": 0.001})
    assert cold["tokens"] == greedy["tokens"]
    out = streamed(server, prompt, min_p=1.0, vllm_xargs={"autodeco": 0})
    assert out["tokens"] == greedy["tokens"]


def test_a_killed_engine_is_an_error_and_the_end(server):
    """Last: the server is gone afterwards."""
    errors = []

    def wait_for_it() -> None:
        try:
            body = {"prompt": [5, 6], "max_tokens": 120, "ignore_eos": True}
            chunks = list(server.stream(body))
            errors.extend(chunk for chunk in chunks if "error" in chunk)
        except (httpx.HTTPError, AssertionError) as error:
            errors.append(error)

    client = threading.Thread(target=wait_for_it)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)  # so that the request is still there
    client.start()
    time.sleep(2)
    os.kill(engine, signal.SIGKILL)
    client.join(60)
    assert not client.is_alive()
    assert errors
    server.process.wait(60)  # raises if it goes on
