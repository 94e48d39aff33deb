"""Settings of an evaluation, and the policies it compares."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from autodeco_fast.errors import foreign
from autodeco_fast.options import Options, documented, option
from autodeco_fast.training.config import DEVICE_MAP, MODEL
from autodeco_fast.values import require

DTYPES = ("auto", "float32", "bfloat16", "float16")


@documented
@dataclass(frozen=True, kw_only=True)
class EvalConfig(Options):
    """Which policies are compared, on which prompts, by which scorer."""

    prompts: Path = option(
        "JSONL of prompt, messages or problem, and of the fields that the scorer reads"
    )
    scorer: str = option(
        "exact, math, boxed, json, choice or checks; "
        "or module:function(prompts, completions, **fields)"
    )
    output: Path = option("folder for the samples and results; a run begun there is continued")
    model: str | None = option(MODEL, None)
    policy: tuple[str, ...] = option(
        "what picks T and the cut, like 'static T=0.7 min_p=0.1', 'head=FOLDER' or "
        "'autodeco=FOLDER'; give several",
        (),
    )
    policies: Path | None = option(
        "YAML: a list of policies, or a map of families to lists, each a curve of the figure", None
    )
    samples: int = option("of a prompt under every policy", 4, must_be="at least 1")
    max_new_tokens: int = option("tokens of a sample", 128, must_be="at least 1")
    stop: tuple[str, ...] = option(
        "a text, or of a model a special token, that ends a sample, and is no part of it", ()
    )
    batch_size: int = option(
        "samples drawn at once; with an endpoint, requests at once", 64, must_be="at least 1"
    )
    success: float = option("the score from which a sample is right", 1.0, must_be="positive")
    entropy_records: int = option(
        "valid records of a prompt that a field's entropy is of, or all if fewer; 0: half of the "
        "samples",
        0,
        must_be="≥ 0",
    )
    dtype: str = option(
        "of the model; auto is bfloat16 where that is fast", DTYPES[0], choices=DTYPES
    )
    endpoint: str | None = option(
        "of an OpenAI-compatible server, like http://localhost:8000/v1, instead of a model", None
    )
    endpoint_model: str | None = option("what the server calls its model", None)
    seed: int = option("of the noise, the same under every policy", 0)
    device_map: str | None = option(DEVICE_MAP, None)

    def __post_init__(self):
        super().__post_init__()
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give either model or endpoint")
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError("endpoint and endpoint_model must be given together")
        if self.endpoint is not None:
            check_url(self.endpoint)
        require(all(self.stop), "stop", self.stop, "texts that are not empty")

    @property
    def records(self) -> int:
        """How many records of a prompt entropies are taken of."""
        return self.entropy_records or max(1, self.samples // 2)


def check_url(url: str) -> None:
    """Raises ValueError unless it is an http or https address without a password."""
    with foreign(f"endpoint must be an http or https address, got {url!r}"):
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    require(bool(fits), "endpoint", url, "an http or https address")
    if parts.username or parts.password:
        raise ValueError("endpoint must hold no password: give it as OPENAI_API_KEY")


def named_policies(config: EvalConfig) -> dict[str, str | None]:
    """The texts of all policies → the family that the file names, None where it does not.

    Raises:
        ValueError: for a file of another form, or a policy that is there twice.
    """
    named = [(text, None) for text in config.policy]
    if config.policies is not None:
        named += _from_yaml(config.policies)
    found = dict(named)
    if len(found) < len(named):
        texts = [text for text, _ in named]
        twice = next(text for text in texts if texts.count(text) > 1)
        raise ValueError(f"policy must be there once, got {twice!r} twice")
    return found


def _from_yaml(path: Path) -> list[tuple[str, str | None]]:
    import yaml

    if not path.is_file():
        raise ValueError(f"policies must be a YAML file, got {str(path)!r}, which is no file")
    content = path.read_bytes()
    with foreign(f"policies {path} is not YAML"):
        value = yaml.safe_load(content)
    families = value if isinstance(value, dict) else {None: value}
    for family, texts in families.items():
        named = family is None or isinstance(family, str)
        listed = isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)
        if not (named and listed):
            raise ValueError(
                f"policies {path} must be a list of policies or a map of families to such lists, "
                f"got {type(texts).__name__} {'' if family is None else family!r}".rstrip()
            )
    return [(text, family) for family, texts in families.items() for text in texts]
