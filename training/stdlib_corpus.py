"""The Python standard library's own source text, split by module into train / head / held-out.

Every Python installation carries this text, so the embedded model, the demo and its report need no
download. A module is the first component of a file's path (`email/message.py` belongs to `email`),
and the split is a fixed list of names: whatever is in neither list is training text. A test file
that names a head or held-out module (`test_argparse.py`, `test_json/`) is left out altogether.
"""

import re
import sysconfig
from pathlib import Path

HEAD = frozenset(
    "base64 bdb cmd codecs concurrent contextlib copy dataclasses difflib dis email enum functools "
    "getpass glob "
    "graphlib hashlib html http imaplib inspect ipaddress urllib wsgiref xmlrpc zoneinfo".split()
)
HELD_OUT = frozenset(
    "argparse ast calendar configparser csv doctest fractions gzip heapq json logging mailbox "
    "optparse pathlib pdb "
    "plistlib pprint queue random sched shelve shlex smtplib socketserver statistics string "
    "tempfile textwrap timeit "
    "tomllib trace uuid weakref webbrowser zipfile".split()
)
# Tables and generated text: long, dull, and unlike the code people write.
_TABLES = re.compile(
    r"^(encodings/(?!__init__|aliases|idna|punycode)|pydoc_data/|_sysconfigdata|site-packages/|__phello__)"
)
_TEST = re.compile(
    r"^(test|idlelib/idle_test|unittest/test|distutils/tests|lib2to3/tests|ctypes/test|tkinter/test)/"
)
_LONGEST = 400_000  # bytes; longer files are data


def module_of(relative: str) -> str:
    """The top-level module a path below the library root belongs to."""
    return relative.split("/")[0].removesuffix(".py")


def split_of(relative: str) -> str | None:
    """`"train"`, `"head"`, `"held_out"`, or None for a file that belongs to no split.

    Args:
        relative: path below the library root, with forward slashes.
    """
    if _TABLES.match(relative):
        return None
    if _TEST.match(relative):
        words = set(re.split(r"[/_.]", relative))
        return None if words & (HEAD | HELD_OUT) else "train"
    module = module_of(relative)
    return "head" if module in HEAD else "held_out" if module in HELD_OUT else "train"


def read_split(split: str, root: Path | None = None) -> list[tuple[str, str]]:
    """All files of one split as `(relative path, text)`, sorted by path.

    Args:
        split: `"train"`, `"head"` or `"held_out"`.
        root: library root; that of the running interpreter by default.

    Raises:
        FileNotFoundError: if the library ships without source text for this split.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if split_of(relative) != split or path.stat().st_size > _LONGEST:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test files are in other encodings on purpose
            continue
        if text.strip():
            found.append((relative, text))
    if not found:
        raise FileNotFoundError(f"no standard library source for split {split!r} under {root}")
    return found
