"""The command line in this process: what it returns and says."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from autodeco_fast.cli import run
from tests.tiny_models import VOCAB, tiny_model

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> Done:
    """`autodeco-fast …`; a bug's traceback is raised here."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def assert_refuses(done: Done, *words: str) -> None:
    """One line on standard error, with these words, and exit code 2."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr, done.stderr


def listing(folder: Path) -> dict[str, int]:
    """Every file below a folder, hidden ones too, with the time of its last change."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def save_tiny(folder: Path) -> Path:
    """A random model of 96 ids and width 32 with a tokenizer of words, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(2, VOCAB)} | {"<unk>": 0, "<s>": 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny_model("llama").bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<s>"
    ).save_pretrained(folder)
    return folder
