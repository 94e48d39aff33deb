"""Evaluation against an OpenAI-compatible server: one on this machine's loopback."""

import json
import signal
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from autodeco_fast.policies import parse
from autodeco_fast.training import eval_endpoint
from autodeco_fast.training.eval_config import EvalConfig
from autodeco_fast.training.eval_endpoint import sampling_fields
from autodeco_fast.training.eval_requests import seed_of
from autodeco_fast.training.evaluate import evaluate
from tests.evaluations import QUIET, samples_of


class Server:
    """Answers with what `answer(path, body)` returns: a status and JSON, or bytes."""

    def __init__(self, answer):
        self.requests, self.headers, lock = [], [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                with lock:
                    self.requests.append((handler.path, body))
                    self.headers.append(dict(handler.headers))
                    status, said = answer(handler.path, body)
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                handler.send_response(status)
                for name, value in self.extra.items():
                    handler.send_header(name, value)
                handler.send_header("Content-Length", str(len(data)))
                handler.end_headers()
                handler.wfile.write(data)

            def log_message(handler, *_):
                pass

        self.extra = {}
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def completion(path: str, body: dict) -> tuple[int, dict]:
    """Says which seed it saw; every third sample is cut off."""
    text = f"{body['seed'] % 5} apples\nand more"
    reason = "length" if body["seed"] % 3 == 0 else "stop"
    key = {"message": {"content": text}} if "chat" in path else {"text": text}
    choice = {**key, "finish_reason": reason}
    return 200, {"choices": [choice], "usage": {"completion_tokens": 7}}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "How many?"}]
    lines = [
        {"prompt": "How many?", "answer": "3 apples"},
        {"messages": chat, "answer": "3 apples"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(eval_endpoint, "FIRST_WAIT", 0.001)
    monkeypatch.setattr("autodeco_fast.training.eval_page.draw", lambda points, label: b"<svg/>")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def config(prompts, url: str, **options) -> EvalConfig:
    options = {
        "policy": ("static T=0.7 min_p=0.1", "static T=1 top_p=0.9 top_k=40"),
        "samples": 4,
        "batch_size": 3,
        "max_new_tokens": 9,
        "stop": ("\n",),
        "output": prompts.parent / "out",
        **options,
    }
    return EvalConfig(
        endpoint=url, endpoint_model="tiny", prompts=prompts, scorer="exact",
        **options,
    )  # fmt: skip


def test_asks_for_each_sample_once_under_its_seed(prompts):
    with Server(completion) as server:
        results = evaluate(config(prompts, server.url), console=QUIET)
        again = evaluate(config(prompts, server.url), console=QUIET)
        assert results == again
        asked = server.requests
    assert Counter(path for path, _ in asked) == {"/v1/completions": 8, "/v1/chat/completions": 8}
    for path, body in asked:
        assert body["model"] == "tiny"
        assert body["max_tokens"] == 9
        assert body["stop"] == ["\n"]
        assert ("messages" in body) == ("chat" in path) != ("prompt" in body)
    said = ("temperature", "top_p", "min_p", "top_k", "repetition_penalty")
    fields = {
        tuple(sorted((name, value) for name, value in body.items() if name in said))
        for _, body in asked
    }
    assert fields == {
        (
            ("min_p", 0.1),
            ("repetition_penalty", 1.0),
            ("temperature", 0.7),
            ("top_k", -1),
            ("top_p", 1.0),
        ),
        (
            ("min_p", 0.0),
            ("repetition_penalty", 1.0),
            ("temperature", 1.0),
            ("top_k", 40),
            ("top_p", 0.9),
        ),
    }
    seeds = Counter(body["seed"] for _, body in asked)
    assert seeds == {seed_of(0, p, s): 2 for p in range(2) for s in range(4)}
    samples = samples_of(prompts.parent / "out")
    assert len(samples) == 16
    for (policy, *_), sample in samples.items():
        assert sample["text"] == f"{sample['seed'] % 5} apples"
        assert sample["score"] == (sample["seed"] % 5 == 3)
        assert sample["truncated"] == (sample["seed"] % 3 == 0)
        assert sample["tokens"] is sample["kept"] is None
        assert sample["temperature"] == [0.7 if "0.7" in policy else 1.0] * 7
    measures = results["policies"][0]["tasks"]["all"]
    assert measures["kept"]["mean"] is None
    assert measures["temperature"]["mean"] == pytest.approx(0.7)
    assert "apples" in (prompts.parent / "out/eval.html").read_text()


def test_the_key_is_sent_and_written_nowhere(prompts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\n")
    with Server(completion) as server:
        evaluate(config(prompts, server.url), console=QUIET)
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    for path in (prompts.parent / "out").iterdir():
        assert "sk-secret" not in path.read_text()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sec\nret")
    refused(config(prompts, "http://127.0.0.1:9/v1", seed=1, output=prompts.parent / "b"),
            "OPENAI_API_KEY must be printable ASCII", but_not="sec")  # fmt: skip


def test_the_key_does_not_follow_a_redirect(prompts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server(completion) as elsewhere, Server(lambda *_: (302, {})) as server:
        server.extra["Location"] = f"{elsewhere.url}/completions"
        refused(config(prompts, server.url), "does not answer")
        assert not any("Authorization" in headers for headers in elsewhere.headers)


def refused(settings: EvalConfig, *words: str, but_not: str = "\n") -> None:
    with pytest.raises(ValueError) as caught:
        evaluate(settings, console=QUIET)
    for word in words:
        assert word in str(caught.value), caught.value
    assert but_not not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_busy_is_asked_again(prompts):
    calls = Counter()

    def busy(path, body):
        calls[body["seed"]] += 1
        if calls[body["seed"]] == 1:
            return 503, {"error": "loading"}
        return completion(path, body)

    with Server(busy) as server:
        evaluate(config(prompts, server.url, policy=("static T=1",)), console=QUIET)
    assert set(calls.values()) == {2}
    assert len(samples_of(prompts.parent / "out")) == 8


def test_a_run_that_broke_goes_on(prompts):
    asked, broken = [], [True]

    def breaks(path, body):
        asked.append(body["seed"])
        return (400, {"error": "no"}) if broken[0] and len(asked) > 5 else completion(path, body)

    with Server(breaks) as server:
        settings = config(prompts, server.url, policy=("static T=1",))
        refused(settings, "400", "no")
        assert len(samples_of(prompts.parent / "out")) == 3  # a batch
        broken[0] = False
        evaluate(settings, console=QUIET)
    assert len(samples_of(prompts.parent / "out")) == 8
    assert max(Counter(asked[:3]).values()) == 1
    assert not set(asked[:3]) & set(asked[6:])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, {"error": "bad key"}), ("does not answer: 401", "bad key")),
        ((500, {}), ("does not answer: 500",)),
        ((200, b"<html>"), ("not JSON",)),
        ((200, {"choices": []}), ("answers something else than completions",)),
        ((200, {"choices": [{"text": "x", "finish_reason": "stop"}]}),
         ("answers something else than completions: KeyError: 'usage'",)),
        ((200, [1]), ("answers something else",)),
    ],
    ids=range(6),
)  # fmt: skip
def test_what_is_no_answer_is_one_line(prompts, answer, words):
    with Server(lambda *_: answer) as server:
        refused(config(prompts, server.url), *words)


def test_nobody_there(prompts):
    with Server(completion) as server:
        pass
    refused(config(prompts, server.url), "does not answer", "refused")


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://h/v1", "localhost:8000", "http://", "", "http://[", 3]
)
def test_other_addresses_are_refused(prompts, url):
    with pytest.raises(ValueError, match="endpoint must be"):
        config(prompts, url)


def test_passwords_in_the_address_are_refused(prompts):
    with pytest.raises(ValueError, match="must hold no password") as caught:
        config(prompts, "http://me:hush@host/v1")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("text", ["entropy a=0.5", "p_less", "edt t0=1 theta=0.1"])
def test_policies_that_the_protocol_cannot_say_are_refused(prompts, text):
    refused(config(prompts, "http://127.0.0.1:9/v1", policy=(text,)), "policy must be static", text)


def test_static_policies_in_the_words_of_the_protocol():
    """With a top-p always: a server may have another of its own."""
    fixed = {"top_p": 1.0}
    assert sampling_fields(parse("greedy")) == {"temperature": 0.0, **fixed}
    assert sampling_fields(parse("static T=0.8 scale=2 t_max=1.5")) == {"temperature": 1.5, **fixed}
    assert sampling_fields(parse("static T=0.1 t_min=0.3")) == {"temperature": 0.3, **fixed}


def _without_extensions(path: str, body: dict) -> tuple[int, dict]:
    """A server that knows the protocol alone."""
    unknown = {"min_p", "top_k", "repetition_penalty"} & set(body)
    if unknown:
        return 400, {"error": f"Unrecognized request argument supplied: {min(unknown)}"}
    return completion(path, body)


def test_a_server_without_extensions_is_not_told_what_cuts_nothing(prompts):
    with Server(_without_extensions) as server:
        evaluate(config(prompts, server.url, policy=("static T=1 top_p=0.9",)), console=QUIET)
        told = ["min_p" in body for _, body in server.requests]
        assert told[0]
        assert not any(told[6:])  # a batch of three, each asked twice
        refused(config(prompts, server.url, output=prompts.parent / "b"), "400", "supplied: min_p")
    assert len(samples_of(prompts.parent / "out")) == 8


def test_an_interrupt_does_not_wait_for_a_server(prompts):
    """Nor does the end of the process: what waits for an answer is daemons."""
    asked, release = threading.Event(), threading.Event()

    def hangs(path, body):
        asked.set()
        release.wait()
        return completion(path, body)

    def interrupt():
        asked.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    give_up = threading.Timer(10, release.set)
    give_up.start()
    before = set(threading.enumerate())
    with Server(hangs) as server:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(prompts, server.url), console=QUIET)
        hanging = not release.is_set()
        alive = set(threading.enumerate()) - before - {server.thread, give_up}
        release.set()
        give_up.cancel()
    assert hanging
    assert all(thread.daemon for thread in alive)
