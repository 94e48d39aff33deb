"""What the page may ask for, and a completion as it comes: text, and the temperature of each token.

vLLM streams the text and writes the predicted temperatures to a log, a token's line before the
token is sent (docs/serving.md); the two are joined here.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from http.client import HTTPResponse
from pathlib import Path

from autodeco_fast.errors import foreign, line, parse_json
from autodeco_fast.options import Options, documented, option
from autodeco_fast.training.shading import opacity
from autodeco_fast.values import require
from autodeco_fast.values import text as check_text

_DATA, _DONE = b"data: ", b"[DONE]"
_UNREADABLE = "the log of temperatures cannot be read"
_LONGEST_ERROR = 1 << 16  # bytes that are read of one


@documented
@dataclass(frozen=True, kw_only=True)
class Asked(Options):
    """One completion.

    Raises:
        ValueError: for a value of another type or out of range.
    """

    prompt: str = option("the text to continue")
    adaptive: bool = option("whether the head picks the temperatures")
    max_tokens: int = option("the most new tokens", must_be="at least 1")
    one_line: bool = option("whether it ends with the line", False)
    temperature: float = option("T of a static completion", 1.0, must_be="≥ 0")
    min_p: float = option("Min-P of a static completion, 0 cuts nothing", 0.0, must_be="in [0, 1]")
    top_p: float = option("top-p of a static completion", 1.0, must_be="in (0, 1]")
    t_scale: float = option("factor on T of an adaptive one", 1.0, must_be="positive")

    def __post_init__(self):
        super().__post_init__()
        require(bool(check_text("prompt", self.prompt)), "prompt", self.prompt, "some text")

    @classmethod
    def read(cls, body: bytes) -> "Asked":
        """From JSON.

        Raises:
            ValueError: for anything else than an object with these keys.
        """
        given = parse_json(body, "request")
        if not isinstance(given, dict):
            raise ValueError(f"a request must be a JSON object, got {type(given).__name__}")
        known = {each.name: each for each in fields(cls)}
        for name in given:
            if name not in known:
                raise ValueError(f"a request's keys are {', '.join(known)}, got {name!r}")
        for name, each in known.items():
            if name not in given and each.default is MISSING:
                raise ValueError(f"a request must have the key {name!r}")
        return cls(**given)

    def body(self, model: str) -> dict:
        """The request to vLLM's `/v1/completions`."""
        common = {"model": model, "prompt": self.prompt, "max_tokens": self.max_tokens}
        common |= {"stream": True, "logprobs": 0}  # with them come the texts of single tokens
        if self.one_line:
            common["stop"] = ["\n"]
        if self.adaptive:
            own = {"t_scale": self.t_scale, "autodeco_log": uuid.uuid4().hex}
            return {**common, "temperature": 1, "vllm_xargs": own}
        cut = {"min_p": self.min_p, "top_p": self.top_p}
        return {**common, "temperature": self.temperature, **cut, "vllm_xargs": {"autodeco": 0}}


class Temperatures:
    """Of one request's tokens, from the log; lines from before it was made are not read.

    Args:
        log: the file.
        key: the request's `autodeco_log`.

    Raises:
        ValueError: if it cannot be read.
    """

    def __init__(self, log: Path, key: str):
        self._log, self._key = log, key
        with foreign(_UNREADABLE):
            self._at = log.stat().st_size
        self._found: dict[int, float] = {}

    def of(self, index: int) -> float:
        """Of a token that has been sent.

        Raises:
            ValueError: if the log does not hold it, or cannot be read.
        """
        if index not in self._found:
            with foreign(_UNREADABLE):
                self._read()
        if index not in self._found:
            raise ValueError(f"the log of temperatures has no line of token {index}")
        return self._found[index]

    def _read(self) -> None:
        with self._log.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        for written in whole.splitlines():
            entry = json.loads(written)
            if entry["id"] == self._key:
                self._found[entry["index"]] = entry["temperature"]


def events(answer: HTTPResponse, temperatures: Temperatures | float) -> Iterator[dict]:
    """What the page gets of vLLM's answer: tokens as they come, then why they end.

    A token is `{"text", "temperature", "opacity"}`; the last event is `{"end": reason}`, with
    vLLM's word for it: `stop` or `length`.

    Args:
        answer: to a request of `Asked.body`.
        temperatures: of its tokens; one number for a static completion.

    Raises:
        ValueError: with what vLLM says, if it refuses, breaks off or answers something else.
    """
    if answer.status != 200:
        raise ValueError(f"vLLM: {_complaint(answer.read(_LONGEST_ERROR))}")
    count, reason = 0, None
    for said in answer:
        if not said.startswith(_DATA):
            continue
        said = said.removeprefix(_DATA).strip()
        if said == _DONE:
            yield {"end": reason}
            return
        with foreign("vLLM answers something else than a completion"):
            chunk = json.loads(said)
            choice = None if "error" in chunk else chunk["choices"][0]
            texts = [] if choice is None else _texts(choice)
        if choice is None:
            raise ValueError(f"vLLM: {_complaint(said)}")
        for text in texts:
            fixed = isinstance(temperatures, float)
            T = temperatures if fixed else temperatures.of(count)
            yield {"text": text, "temperature": T, "opacity": round(opacity(T), 4)}
            count += 1
        reason = choice["finish_reason"] or reason
    raise ValueError("vLLM broke off")


def _texts(choice: dict) -> list[str]:
    """The text of each token of a chunk; where those of single tokens do not make up the chunk's,
    as in the middle of a character, it stands with the last of them."""
    whole, tokens = choice["text"], (choice["logprobs"] or {"tokens": []})["tokens"]
    if len(tokens) < 2 or "".join(tokens) != whole:
        return ["" for _ in tokens[:-1]] + ([whole] if tokens or whole else [])
    return tokens


def _complaint(said: bytes) -> str:
    """The message in an error of vLLM's, on one line."""
    try:
        message = json.loads(said)["error"]["message"]
    except (ValueError, TypeError, KeyError):
        message = said.decode("utf-8", "replace")
    return line(ValueError(message)) if message else "an error without a message"
