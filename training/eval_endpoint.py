"""Samples of an OpenAI-compatible server. Policies are static: what its protocol can say.

What a request does not say, a server takes from the model's own generation configuration, vLLM for
example: so that samples are drawn as a policy says, the settings it leaves alone are sent, too.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from threading import Thread

from autodeco_fast.errors import foreign, line, parse_json
from autodeco_fast.policies import Policy, Static
from autodeco_fast.training.eval_requests import Draw, Drawn, Request, cut_at_stop
from autodeco_fast.training.prompts import Prompt

KEY = "OPENAI_API_KEY"  # of the environment; sent to the server and written nowhere
ATTEMPTS, FIRST_WAIT = 5, 0.5  # seconds, doubled from attempt to attempt
TIMEOUT = 600  # seconds, of one answer
_LARGEST = 1 << 26  # bytes of an answer
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_REFUSED = (400, 422)  # for a field that the server does not know, among other reasons
# Extensions of the protocol, as vLLM, SGLang and llama.cpp have them: nothing cut, nothing changed.
NEUTRAL = {"min_p": 0.0, "top_k": -1, "repetition_penalty": 1.0}


class _Refused(ValueError):
    """The server does not take a request as it is."""


class Endpoint:
    """Draws from a server's `/completions`, or `/chat/completions` for chats."""

    def __init__(
        self,
        url: str,
        model: str,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
    ):
        self.url, self.model, self.prompts = url.rstrip("/"), model, prompts
        self.max_new_tokens, self.stop = max_new_tokens, tuple(stop)
        self.extended = True  # whether the server is told what NEUTRAL says

    def length(self, prompt: int) -> int:
        """Of a prompt, in characters."""
        return len(self.prompts[prompt].shown)

    def check(self, policy: Policy) -> None:
        """Raises ValueError for a policy that is not static."""
        sampling_fields(policy)

    @contextmanager
    def under(self, policy: Policy) -> Iterator[Draw]:
        """Yields what draws a batch of samples under a policy, all requests at once.

        It raises ValueError if the server does not answer, or says something else.
        """
        settings = sampling_fields(policy)

        def draw(requests: Sequence[Request]) -> list[Drawn]:
            return _at_once(lambda request: self._drawn(request, settings), requests)

        yield draw

    def _drawn(self, request: Request, settings: dict) -> Drawn:
        content = self.prompts[request.prompt].content
        chat = not isinstance(content, str)
        body = {
            "model": self.model,
            "messages" if chat else "prompt": content,
            "max_tokens": self.max_new_tokens,
            "seed": request.seed,
            **settings,
            **({"stop": list(self.stop)} if self.stop else {}),
        }
        path = "chat/completions" if chat else "completions"
        answer = self._answer(f"{self.url}/{path}", body)
        with foreign(f"endpoint {self.url} answers something else than completions"):
            choice = answer["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
            length, reason = answer["usage"]["completion_tokens"], choice["finish_reason"]
            return Drawn(
                text=cut_at_stop(str(text or ""), self.stop),
                tokens=None,
                temperature=[settings["temperature"]] * int(length),
                kept=None,
                truncated=reason == "length",
                length=int(length),
            )

    def _answer(self, url: str, body: dict) -> dict:
        """The answer to a request with all settings, or to one without extensions that say nothing,
        if the server takes only that."""
        if self.extended:
            try:
                return self._post(url, json.dumps({**NEUTRAL, **body}).encode())
            except _Refused:
                answer = self._post(url, json.dumps(body).encode())
                self.extended = False
                return answer
        return self._post(url, json.dumps(body).encode())

    def _post(self, url: str, body: bytes) -> dict:
        """The answer, after a few attempts.

        Raises:
            ValueError: with what the server, or the way to it, says.
        """
        request = urllib.request.Request(url, data=body, method="POST")
        request.add_header("Content-Type", "application/json")
        key = os.environ.get(KEY, "").strip()
        if not (key.isascii() and key.isprintable()):  # never shown
            raise ValueError(f"{KEY} must be printable ASCII")
        if key:  # not sent on to where the server may redirect
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return parse_json(answer.read(_LARGEST), f"endpoint {url}")
            except urllib.error.HTTPError as error:
                said = " ".join(error.read(400).decode("utf-8", "replace").split())
                failure, again = f"{error.code} {error.reason}: {said}", error.code in _AGAIN
                if error.code in _REFUSED:
                    raise _Refused(_silence(url, failure)) from None
            except (OSError, http.client.HTTPException) as error:  # no way there, or it broke
                failure, again = line(error), True
            if not again:
                break
            if attempt + 1 < ATTEMPTS:
                time.sleep(FIRST_WAIT * 2**attempt)
        raise ValueError(_silence(url, failure))


def _silence(url: str, failure: str) -> str:
    return f"endpoint {url} does not answer: {failure}"


def _at_once(function: Callable[[Request], Drawn], requests: Sequence[Request]) -> list[Drawn]:
    """What a function gives of all requests, each in a thread, when all have ended.

    The threads are daemons: neither Ctrl-C nor the end of the process waits for a server.
    """

    def run(future: Future, request: Request) -> None:
        try:
            future.set_result(function(request))
        except BaseException as error:
            future.set_exception(error)

    futures = [Future() for _ in requests]
    for pair in zip(futures, requests):
        Thread(target=run, args=pair, daemon=True).start()
    wait(futures)
    return [future.result() for future in futures]


def sampling_fields(policy: Policy) -> dict:
    """A static policy in the words of the protocol; min_p and top_k, where they cut, are extensions
    of it.

    Raises:
        ValueError: for any other policy.
    """
    if not isinstance(policy, Static):
        raise ValueError(f"policy must be static with an endpoint, got '{policy}'")
    T = max(policy.temperature * policy.scale, policy.t_min)
    T = T if policy.t_max is None else min(T, policy.t_max)
    fields = {"temperature": T, "top_p": 1.0 if policy.top_p is None else policy.top_p}
    for name, neutral in (("min_p", 0.0), ("top_k", None)):
        if getattr(policy, name) != neutral:
            fields[name] = getattr(policy, name)
    return fields
