"""The page of `make serve` and its server, in front of a server that only looks like vLLM."""

import http.client
import json
import re
import socket
import threading
from dataclasses import fields
from pathlib import Path

import pytest

from autodeco_fast.demo import smollm2
from autodeco_fast.demo.serve import __main__ as command
from autodeco_fast.demo.serve.completions import Asked, Temperatures
from autodeco_fast.demo.serve.page_server import PageServer
from autodeco_fast.training.shading import HOTTEST, ORANGE, colour, opacity
from tests.browser import BROWSER, tab
from tests.fake_vllm import FakeVllm, chunk

ADAPTIVE = {"prompt": "A list:", "adaptive": True, "max_tokens": 8, "t_scale": 0.7}
STATIC = {**ADAPTIVE, "adaptive": False, "temperature": 0.8, "min_p": 0.05}
STATIC.pop("t_scale")
DONE = b"data: [DONE]\n\n"
CHUNKS = [
    chunk(" one", [" one"]),
    chunk("", [""]),  # the beginning of a character
    chunk("é", ["é"]),
    chunk(" two three", [" two", " three"]),  # vLLM joins what a slow client has not read
    chunk("ñ", ["", "?"], "length"),
    DONE,
]
TEXTS = [" one", "", "é", " two", " three", "", "ñ"]


@pytest.fixture
def vllm(tmp_path):
    with FakeVllm(tmp_path / "log.jsonl") as fake:
        fake.chunks = CHUNKS
        yield fake


@pytest.fixture
def page(vllm, tmp_path):
    yield from serving(tmp_path / "log.jsonl", vllm.port)


def serving(log: Path, api_port: int):
    with PageServer(
        0, api_port=api_port, model="tiny", log=log, about=command.about(api_port)
    ) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def request(
    page: PageServer, method: str, path: str, body: object = None, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=20)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    if data is not None:
        headers.setdefault("Content-Type", "application/json")
    connection.request(method, path, data, headers)
    answer = connection.getresponse()
    return answer, answer.read()


def completion(page: PageServer, asked: dict) -> list[dict]:
    """The events of a completion, after that of the request."""
    answer, data = request(page, "POST", "/complete", asked)
    assert answer.status == 200, data
    first, *events = map(json.loads, data.splitlines())
    assert first.keys() == {"request"}
    return events


def assert_one_line(error: str, *words: str) -> None:
    assert "\n" not in error
    for word in words:
        assert word in error, error


def test_tokens_come_with_their_temperatures(page, vllm):
    *tokens, end = completion(page, ADAPTIVE)
    assert [token["text"] for token in tokens] == TEXTS
    assert [token["temperature"] for token in tokens] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert all(each["opacity"] == round(opacity(each["temperature"]), 4) for each in tokens)
    assert end == {"end": "length"}
    (sent,) = vllm.requests
    key = sent["vllm_xargs"].pop("autodeco_log")
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", key)
    assert sent == {
        **{"path": "/v1/completions", "model": "tiny", "prompt": "A list:", "max_tokens": 8},
        **{"stream": True, "logprobs": 0, "temperature": 1, "vllm_xargs": {"t_scale": 0.7}},
    }


def test_completions_may_end_with_the_line(page, vllm):
    completion(page, {**ADAPTIVE, "one_line": True})
    assert vllm.requests[0]["stop"] == ["\n"]


def test_static_completions_have_one_temperature_and_no_head(page, vllm):
    *tokens, end = completion(page, STATIC)
    assert [token["text"] for token in tokens] == TEXTS
    assert {token["temperature"] for token in tokens} == {0.8}
    assert end == {"end": "length"}
    (sent,) = vllm.requests
    assert sent["vllm_xargs"] == {"autodeco": 0}
    assert (sent["temperature"], sent["min_p"], sent["top_p"]) == (0.8, 0.05, 1.0)


def test_the_log_is_read_from_where_a_request_began(tmp_path):
    log = tmp_path / "log"
    log.write_text('{"id": "a", "index": 0, "temperature": 9.0}\n')
    found = Temperatures(log, "a")
    with pytest.raises(ValueError, match="no line of token 0"):
        found.of(0)
    with log.open("a") as file:
        file.write('{"id": "a", "index": 0, "temperature": 0.5}\n')
        file.write('{"id": "a", "index": 0, "temperature": 0.6}\n{"id": "a", "ind')
    assert found.of(0) == 0.6
    with log.open("a") as file:
        file.write('ex": 1, "temperature": 0.7}\n')
    assert found.of(1) == 0.7


def test_a_token_without_a_temperature_is_an_error(page, vllm):
    vllm.temperature = lambda index: None if index == 1 else 0.5
    first, error = completion(page, ADAPTIVE)
    assert first["temperature"] == 0.5
    assert_one_line(error["error"], "log of temperatures has no line of token 1")


def test_a_log_that_is_gone_is_an_error(page, vllm, tmp_path):
    log = tmp_path / "log.jsonl"
    before = Temperatures(log, "a")
    log.unlink()
    (error,) = completion(page, ADAPTIVE)
    assert_one_line(error["error"], "the log of temperatures cannot be read: ", "No such file")
    assert not vllm.requests
    with pytest.raises(ValueError, match=r"the log of temperatures cannot be read: .*No such file"):
        before.of(0)


@pytest.mark.parametrize(
    "body, complaint",
    [
        (b"{", "request: not JSON"),
        ([1], "a request must be a JSON object, got list"),
        ({}, "must have the key 'prompt'"),
        ({**ADAPTIVE, "modle": 1}, "top_p, t_scale, got 'modle'"),
        ({**ADAPTIVE, "prompt": ""}, "prompt must be some text, got ''"),
        ({**ADAPTIVE, "prompt": "\ud800"}, "prompt must be Unicode"),
        ({**ADAPTIVE, "prompt": 3}, "prompt must be text, got 3"),
        ({**ADAPTIVE, "adaptive": 1}, "adaptive must be true or false"),
        ({**ADAPTIVE, "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({**ADAPTIVE, "t_scale": 0}, "t_scale must be positive, got 0"),
        ({**ADAPTIVE, "one_line": "yes"}, "one_line must be true or false"),
        ({**STATIC, "temperature": -1}, "temperature must be ≥ 0, got -1"),
        ({**STATIC, "temperature": None}, "temperature must be a finite number"),
        ({**STATIC, "min_p": 1.5}, "min_p must be in [0, 1], got 1.5"),
        ({**STATIC, "top_p": 0}, "top_p must be in (0, 1], got 0"),
    ],
)
def test_wrong_requests_are_refused_on_one_line(page, vllm, body, complaint):
    answer, data = request(page, "POST", "/complete", body)
    assert answer.status == 400
    assert_one_line(json.loads(data)["error"], complaint)
    assert not vllm.requests


def test_every_option_of_the_page_is_checked(page):
    """The table above has a line for each."""
    (mark,) = test_wrong_requests_are_refused_on_one_line.pytestmark
    named = " ".join(complaint for _, complaint in mark.args[1])
    assert all(f"{each.name} must be" in named for each in fields(Asked))


@pytest.mark.parametrize(
    "chunks, complaint",
    [
        ([CHUNKS[0], {"error": {"message": "the engine\nis dead"}}], "vLLM: the engine is dead"),
        ([CHUNKS[0]], "vLLM broke off"),
        ([b"data: {\n"], "vLLM answers something else than a completion"),
        ([b"data: {}\n"], "vLLM answers something else than a completion"),
    ],
)
def test_what_goes_wrong_with_vllm_is_the_last_event(page, vllm, chunks, complaint):
    vllm.chunks = chunks
    *tokens, error = completion(page, ADAPTIVE)
    assert len(tokens) == isinstance(chunks[0], dict)
    assert_one_line(error["error"], complaint)


@pytest.mark.parametrize(
    "said, complaint",
    [
        (b'{"error": {"message": "prompt is\\ntoo long"}}', "vLLM: prompt is too long"),
        (b"Internal Server Error", "vLLM: Internal Server Error"),
        (b"", "vLLM: an error without a message"),
    ],
)
def test_refusals_are_passed_on(page, vllm, said, complaint):
    vllm.status, vllm.chunks = 400, [said]
    (error,) = completion(page, ADAPTIVE)
    assert error == {"error": complaint}


def test_a_dead_vllm(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "log").touch()
    for page in serving(tmp_path / "log", port):
        (error,) = completion(page, STATIC)
        assert_one_line(error["error"], f"vLLM does not answer at http://127.0.0.1:{port}")


def test_who_leaves_is_not_served_on(page, vllm):
    """Also while vLLM says nothing."""
    vllm.chunks = [CHUNKS[0], threading.Event()]
    body = json.dumps(ADAPTIVE).encode()
    with socket.create_connection(("127.0.0.1", page.server_port), timeout=20) as client:
        head = "POST /complete HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = b""
        while b'" one"' not in received:
            received += client.recv(4096)
        assert not vllm.left.is_set()
    assert vllm.left.wait(20)


def test_only_the_page_and_only_its_files(page):
    for path, kind in (("/", "html"), ("/page.css?x=1", "css"), ("/page.js", "javascript")):
        answer, data = request(page, "GET", path)
        assert answer.status == 200
        assert answer.headers["Content-Type"] == f"text/{kind}; charset=utf-8"
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert data
    for path in (
        *("/index.html", "/../page_server.py", "/page.css/../../page_server.py"),
        *("/%2e%2e/page_server.py", "//etc/passwd", "/..%2f..%2fetc/passwd", "/page", "/complete"),
    ):
        answer, data = request(page, "GET", path)
        assert answer.status == 404, path
        assert json.loads(data) == {"error": "there is no such page"}
    assert request(page, "POST", "/", ADAPTIVE)[0].status == 404
    about = json.loads(request(page, "GET", "/about")[1])
    assert about["model"] == smollm2.NAME
    assert about["static"] == {"temperature": 1.0, "min_p": 0.1}
    assert (about["t_scale"], about["min_p"]) == (0.7, 0.1)
    assert len(about["examples"]) == 6


def test_other_sites_get_nothing(page, vllm):
    """A name that points here, a page elsewhere, a form: none of them is the page."""
    for headers in (
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "[::1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Content_Type": "text/plain"},
    ):
        answer, data = request(page, "POST", "/complete", ADAPTIVE, **headers)
        assert answer.status == 403, headers
        assert list(json.loads(data)) == ["error"]
    assert request(page, "GET", "/", Host="evil.example")[0].status == 403
    assert not vllm.requests
    for headers in ({"Origin": f"http://127.0.0.1:{page.server_port}"}, {"Host": "localhost:9"}):
        assert request(page, "POST", "/complete", ADAPTIVE, **headers)[0].status == 200


def test_large_and_endless_requests(page, vllm):
    for length in (str(1 << 21), "-1", "x", "", "9" * 5000, "²"):
        answer, _ = request(page, "POST", "/complete", b"", Content_Length=length)
        assert answer.status == 413, length
    assert not vllm.requests


def test_is_on_loopback_only(page):
    assert page.server_address[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", page.server_port), timeout=5)


def test_shades_are_those_of_the_reports():
    """Orange of this opacity over white is the colour."""
    for T in (0.0, 0.37, 1.0, 2.0, 5.0):
        mixed = [round(255 + opacity(T) * (part - 255)) for part in ORANGE]
        assert colour(T) == f"rgb({','.join(map(str, mixed))})"
    assert opacity(0) == 0
    assert opacity(HOTTEST) == opacity(9) < 1


FINISHED = "document.querySelectorAll('[data-state=done], [data-state=error]').length == 2"
DRAWN = """Array.from(document.querySelectorAll('#%s .drawn')).map(
    each => [each.textContent, Number(each.dataset.temperature), each.style.background])"""
RECORDS = [chunk(' "cat"}', [' "', "cat", '"}'], "stop"), DONE]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium found")
def test_in_a_browser(page, vllm, tmp_path):
    """Started by the address, then again by keys; seen, walked over, on a phone and in the dark."""
    with tab(f"{page.url}?prompt=%3Cb%3E&completions=2&temperature=0.5&go=1", tmp_path) as opened:
        opened.wait_for(FINISHED)
        drawn = opened.value(DRAWN % "adaptive")
        assert [text for text, *_ in drawn] == 2 * TEXTS
        assert [T for _, T, _ in drawn] == 2 * [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
        assert drawn[6][2] == f"rgb(var(--orange) / {round(opacity(0.7), 4)})"
        assert [T for _, T, _ in opened.value(DRAWN % "static")] == [0.5] * 14
        shown = opened.value("document.body.innerText")
        assert "14 tokens at T = 0.10 to 0.70, mean 0.40" in shown
        assert "14 tokens at T = 0.50" in shown
        assert shown.count("<b> one") == 4
        assert "valid" not in shown
        sent = [each for each in vllm.requests if each["vllm_xargs"] == {"autodeco": 0}]
        assert [(each["temperature"], each["min_p"]) for each in sent] == [(0.5, 0.1)] * 2
        for width in (390, 1280):
            opened.look(width=width, dark=width == 390)
            assert opened.value("document.documentElement.scrollWidth <= innerWidth")

        opened.value("document.querySelector('#adaptive .text').focus()")
        for key, code in (("End", 35), ("ArrowLeft", 37), ("ArrowLeft", 37), ("ArrowRight", 39)):
            opened.press(key, code)
        walked = opened.value("document.querySelector('#adaptive .token').innerText")
        assert walked == 'token 13 "" at T = 0.600'

        vllm.chunks = RECORDS
        opened.value("document.querySelector('.examples button').click()")
        opened.value("document.getElementById('prompt').value = '{\"animal\": 1}\\n{\"animal\":'")
        opened.press("Enter", 13, modifiers=2)
        both = "document.body.innerText.split('2 of 2 are valid records').length == 3"
        opened.wait_for(both)
        assert opened.value("document.body.innerText").count('{"animal": "cat"}\u00a0✓') == 4
        assert opened.console == []


@pytest.mark.skipif(BROWSER is None, reason="no Chromium found")
def test_errors_and_stops_in_a_browser(page, vllm, tmp_path):
    vllm.chunks = [CHUNKS[0], {"error": {"message": "the engine is <b>dead"}}]
    problem = "document.getElementById('problem').innerText"
    with tab(f"{page.url}?go=1", tmp_path) as opened:
        opened.wait_for(FINISHED)
        assert opened.value(problem) == "vLLM: the engine is <b>dead"
        assert "1 tokens at T = 0.10 · broken off" in opened.value("document.body.innerText")

        vllm.chunks = [CHUNKS[0], threading.Event()]
        opened.press("Enter", 13, modifiers=2)
        opened.wait_for("document.querySelectorAll('[data-state=running] .drawn').length == 2")
        assert opened.value(problem) == ""
        vllm.chunks = [CHUNKS[2], threading.Event()]
        opened.press("Enter", 13, modifiers=2)  # again, before the first is done
        opened.wait_for("document.querySelectorAll('.drawn').length == 2")
        opened.wait_for(
            "Array.from(document.querySelectorAll('.drawn'), e => e.textContent) == 'é,é'"
        )
        opened.wait_for("document.querySelectorAll('[data-state=running]').length == 2")
        opened.press("Escape", 27)
        opened.wait_for("document.querySelectorAll('[data-state=stopped]').length == 2")
        assert vllm.left.wait(20)

        page.shutdown()
        page.server_close()
        opened.press("Enter", 13, modifiers=2)
        opened.wait_for(FINISHED)
        assert opened.value(problem) == "the page's server does not answer: start it again"


@pytest.mark.skipif(BROWSER is None, reason="no Chromium found")
@pytest.mark.parametrize(
    "query, expected",
    [
        ("cut=typical&go=1", "cut must be one of min_p, top_p, none, got typical min_p true"),
        ("cut=top_p&one_line=false&go=0", " top_p false"),
    ],
)
def test_addresses_that_do_not_start_it(query, expected, page, vllm, tmp_path):
    shown = """[document.getElementById('problem').innerText, document.getElementById('cut').value,
        document.getElementById('one_line').checked].join(' ')"""
    with tab(f"{page.url}?{query}", tmp_path) as opened:
        opened.wait_for("document.querySelector('#static-title small')?.textContent")
        assert opened.value(shown) == expected
        assert opened.value("document.getElementById('stop').disabled")
        assert opened.console == []
    assert not vllm.requests
