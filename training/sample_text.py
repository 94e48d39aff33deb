"""`autodeco-fast sample-text`: a model's own text, to learn from without anybody's data.

A line of the output is a continuation, `{"input_ids": …, "labels": …}`, the ids as they were drawn:
text made of them might be cut into others, and an end added where none was drawn. Continuation k
draws its noise from stream k of the seed, whatever it is batched with. Lines gather in
`<output>.part`, whose first line is the settings and what the model is known by; killed, the same
command goes on behind the last whole line, and the last step renames.
"""

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from autodeco_fast.errors import parse_json
from autodeco_fast.files import append_text, atomic_write
from autodeco_fast.options import Options, documented, option
from autodeco_fast.training.data import IGNORED
from autodeco_fast.training.prompts import encode_prompt, read_prompts
from autodeco_fast.values import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LIVE_SETTINGS = ("output", "batch_size")  # may change when a file is continued


@documented
@dataclass(frozen=True, kw_only=True)
class SampleTextConfig(Options):
    """What text is drawn from a model."""

    model: str = option("folder or hub id of a causal language model")
    output: Path = option("new JSONL file for train and scan; killed, the same command goes on")
    prompts: Path | None = option(
        "JSONL to continue, a line after the other and from the start again: its prompt or "
        "messages, a chat up to its last answer; without it, text from the model's first token on",
        None,
    )
    number: int = option("continuations", 256, must_be="at least 1")
    max_new_tokens: int = option("tokens of a continuation at most", 256, must_be="at least 1")
    temperature: float = option("of the draws; 1 is the model as it is", 1.0, must_be="≥ 0")
    min_p: float = option("cut; 0: none", 0.0, must_be="in [0, 1]")
    batch_size: int = option("continuations drawn at once", 16, must_be="at least 1")
    seed: int = option("of the noise", 0)


def prompt_ids(path: Path, tokenizer, **limits: int | None) -> list[list[int]]:
    """The ids of every line of a prompts file.

    Args:
        limits: what `encode_prompt` keeps to.

    Raises:
        ValueError: naming the line, if one is no prompt, or makes ids that the model does not have
            or too many; if there is no such file, or no line in it.
    """
    return [encode_prompt(tokenizer, prompt, **limits) for prompt in read_prompts(path)]


def _first_token(tokenizer) -> list[int]:
    ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not ids:
        raise ValueError("the tokenizer has no token that a text begins with: give prompts")
    return ids[:1]


def _held(path: Path, output: Path) -> BinaryIO:
    """The file where lines gather, open and locked."""
    given = str(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise ValueError(f"output {given!r} cannot be written: {error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"output {given!r} is being written by another run") from None
    return file


@contextmanager
def _part(output: Path, settings: dict) -> Iterator[tuple[Path, Callable[[dict], int]]]:
    """The file where lines gather, held by this run, and what begins it: given what the model is
    known by, it says how many continuations there are.

    Raises:
        ValueError: if it cannot be written, was begun with other settings or, on the call, of
            another model, or another run holds it.
    """
    path = output.with_name(output.name + ".part")
    with _held(path, output) as file:
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        lines = lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines
        file.truncate(sum(map(len, lines)))
        header = parse_json(lines[0], f"{path}, line 1") if lines else {"settings": settings}
        _check(path, header, "settings", settings, "other settings or prompts")

        def begin(model: dict) -> int:
            if not lines:
                append_text(path, json.dumps({**header, "model": model}) + "\n")
                return 0
            _check(path, header, "model", model, "other weights, dtype or ends of the model")
            return len(lines) - 1

        try:
            yield path, begin
        finally:
            if path.exists() and path.read_bytes().count(b"\n") < 2:
                path.unlink()  # nothing was drawn


def _check(path: Path, header: object, name: str, value: dict, another: str) -> None:
    if not isinstance(header, dict) or header.get(name) != value:
        raise ValueError(f"{path} was begun with {another}: delete it, or name another output")


def _finish(part: Path, output: Path) -> None:
    """The lines behind the first, under the name that was asked for."""
    lines = part.read_bytes().partition(b"\n")[2]
    atomic_write(output, lambda draft: draft.write_bytes(lines))
    part.unlink()


class Sampler:
    """Draws continuations from a causal language model of transformers at one temperature."""

    def __init__(self, model, tokenizer, config: SampleTextConfig):
        from autodeco_fast.policies import Static
        from autodeco_fast.training.base_model import end_ids
        from autodeco_fast.training.eval_source import model_fingerprint

        self.model, self.config, self.ends = model, config, end_ids(model, tokenizer)
        self.pad = (self.ends or [0])[0]
        self.policy = Static(temperature=config.temperature, min_p=config.min_p)
        self.identity = {
            "weights": model_fingerprint(model, tokenizer),
            "dtype": str(model.dtype),
            "ends": sorted(self.ends),
        }

    def __call__(self, prompts: list[list[int]], first: int) -> list[dict]:
        """Continues a batch of prompts; `first` is the number of the first one.

        Raises:
            ValueError: if the model makes logits that are NaN or infinite.
        """
        import torch

        from autodeco_fast import attach
        from autodeco_fast.training.base_model import left_padded
        from autodeco_fast.training.drawing import plain

        ids, mask = left_padded(prompts, self.pad, self.model.device)
        try:
            with torch.inference_mode(), plain(self.model), attach(self.model, self.policy):
                out = self.model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=self.config.max_new_tokens,
                    pad_token_id=self.pad,
                    eos_token_id=self.ends or None,
                    seed=self.config.seed,
                    stream=torch.arange(first, first + len(prompts)),
                )
        except RuntimeError as error:
            if "cannot be sampled from" not in str(error):
                raise
            raise ValueError(
                f"model {self.config.model!r} makes logits that are NaN or infinite"
            ) from None
        new_ids = out[:, ids.shape[1] :].tolist()
        return [self._line(prompt, new) for prompt, new in zip(prompts, new_ids)]

    def _line(self, prompt: list[int], new: list[int]) -> dict:
        """As training reads it; what follows an end is padding."""
        end = next((i for i, token in enumerate(new) if token in self.ends), len(new))
        new = new[: end + 1]
        return {"input_ids": [*prompt, *new], "labels": [IGNORED] * len(prompt) + new}


def _new_tokens(lines: list[dict]) -> int:
    return sum(sum(y != IGNORED for y in line["labels"]) for line in lines)


def _checked(config: SampleTextConfig) -> tuple["PreTrainedTokenizerBase", list[list[int]]]:
    """The tokenizer and the prompts; the model's weights are not looked at."""
    from autodeco_fast.numerics import HIGHEST_TEMPERATURE
    from autodeco_fast.training import base_model

    most = f"at most {HIGHEST_TEMPERATURE:g}"
    require(config.temperature <= HIGHEST_TEMPERATURE, "temperature", config.temperature, most)
    if config.output.exists():
        raise ValueError(f"output {str(config.output)!r} is there already; name another file")
    found, tokenizer = base_model.facts(config.model), base_model.load_tokenizer(config.model)
    if found.positions is not None and found.positions <= config.max_new_tokens:
        raise ValueError(
            f"max_new_tokens must be below the model's {found.positions} positions, got "
            f"{config.max_new_tokens}"
        )
    if config.prompts is None:
        prompts = [_first_token(tokenizer)]
    else:
        prompts = prompt_ids(
            config.prompts,
            tokenizer,
            vocabulary=found.vocabulary,
            positions=found.positions,
            new_tokens=config.max_new_tokens,
        )
    return tokenizer, prompts


def _loaded(config: SampleTextConfig, tokenizer: "PreTrainedTokenizerBase") -> Sampler:
    import torch

    from autodeco_fast.training import base_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = base_model.frozen_dtype(device)
    model = base_model.load_causal_lm(config.model, dtype=dtype).to(device).eval()
    return Sampler(model, tokenizer, config)


def sample_text(config: SampleTextConfig) -> None:
    """Draws what is still to be drawn, with a progress bar, and writes the output.

    Raises:
        ValueError: for settings, prompts or a model that cannot be used, or an output that is there
            already.
    """
    from rich.console import Console

    from autodeco_fast.training.console import Speed, progress_bar
    from autodeco_fast.training.scan_store import fingerprint

    tokenizer, prompts = _checked(config)
    settings = {n: v for n, v in asdict(config).items() if n not in (*_LIVE_SETTINGS, "prompts")}
    settings["prompts"] = fingerprint(json.dumps(prompts).encode())
    console = Console(stderr=True, markup=False)
    with _part(config.output, settings) as (part, begin):
        sampler = _loaded(config, tokenizer)
        done = begin(sampler.identity)
        with progress_bar(console) as move:
            move(total=config.number, completed=done)
            on_lines = Speed(move)
            while done < config.number:
                numbers = range(done, min(done + config.batch_size, config.number))
                lines = sampler([prompts[k % len(prompts)] for k in numbers], done)
                append_text(part, "".join(json.dumps(line) + "\n" for line in lines))
                done += len(lines)
                on_lines(len(lines), _new_tokens(lines))
        _finish(part, config.output)
    console.print(f"written to {config.output}: {done:,} continuations", soft_wrap=True)
