"""Samples of an OpenAI-compatible server. Policies are static: what its protocol can say."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from autodeco_fast.errors import foreign, line, parse_json
from autodeco_fast.policies import Policy, Static
from autodeco_fast.training.eval_requests import Draw, Drawn, Request, cut_at_stop
from autodeco_fast.training.prompts import Prompt

KEY = "OPENAI_API_KEY"  # of the environment; sent to the server and written nowhere
ATTEMPTS, FIRST_WAIT = 5, 0.5  # seconds, doubled from attempt to attempt
TIMEOUT = 600  # seconds, of one answer
_LARGEST = 1 << 26  # bytes of an answer
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)


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
            with ThreadPoolExecutor(len(requests)) as pool:
                return list(pool.map(lambda request: self._drawn(request, settings), requests))

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
        answer = self._post(f"{self.url}/{path}", json.dumps(body).encode())
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
            except (OSError, http.client.HTTPException) as error:  # no way there, or it broke
                failure, again = line(error), True
            if not again:
                break
            if attempt + 1 < ATTEMPTS:
                time.sleep(FIRST_WAIT * 2**attempt)
        raise ValueError(f"endpoint {url} does not answer: {failure}")


def sampling_fields(policy: Policy) -> dict:
    """A static policy in the words of the protocol; min_p and top_k are extensions of it.

    Raises:
        ValueError: for any other policy.
    """
    if not isinstance(policy, Static):
        raise ValueError(f"policy must be static with an endpoint, got '{policy}'")
    T = max(policy.temperature * policy.scale, policy.t_min)
    fields = {"temperature": T if policy.t_max is None else min(T, policy.t_max)}
    for name, neutral in (("min_p", 0.0), ("top_p", None), ("top_k", None)):
        if getattr(policy, name) != neutral:
            fields[name] = getattr(policy, name)
    return fields
