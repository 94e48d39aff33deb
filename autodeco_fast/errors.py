"""The one place where failures of files, loaders and parsers become a line for the user.

Our own checks raise ValueError, the file system OSError, safetensors its own error: `USERS`, which
the command line shows as one line. What foreign code raises on a user's file can be anything, so
calls of it, and of nothing else, run inside `foreign`. Whatever else is raised is a bug and stays a
traceback.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from autodeco_fast.urls import Location

USERS = (ValueError, OSError, SafetensorError)
_LONGEST = 400  # characters


def line(error: BaseException) -> str:
    """What an exception says, on one line that any encoding can print."""
    text = " ".join(str(error).split())
    if not isinstance(error, USERS) or not text:
        text = f"{type(error).__name__}: {text}"
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def foreign(complaint: str, raises: type[ValueError] = ValueError) -> Iterator[None]:
    """Around a call of a foreign loader or parser: whatever it raises is about the user's file.

    Raises:
        ValueError: of the type `raises`, the complaint and what was raised.
    """
    try:
        yield
    except Exception as error:
        said = line(error)
        if len(said) > _LONGEST:
            said = said[:_LONGEST] + "…"
        raise raises(f"{complaint}: {said}") from error


def parse_json(text: str | bytes, where: str) -> object:
    """JSON of any depth that Python takes.

    Raises:
        ValueError: naming `where`.
    """
    with foreign(f"{where}: not JSON"):
        return json.loads(text)


def read_json_object(path: "Location") -> dict:
    """The JSON object in a file.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    value = parse_json(path.read_bytes(), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
