"""The folder a demo writes to, and what it says on the way."""

import json
import shutil
from pathlib import Path

from rich.console import Console

from autodeco_fast.files import write_text

MARKER = "demo.json"  # what shows that a folder is a demo's, to be replaced by the next
FOLDERS = ("texts", "scans", "head", "report", "evaluation", "records-head")


def begin(output: Path, settings: dict) -> None:
    """Takes away what an earlier demo left, and marks the folder.

    Raises:
        ValueError: if one of the demo's folders is there, and no demo's.
    """
    present = [name for name in FOLDERS if (output / name).exists()]
    if present and not (output / MARKER).is_file():
        raise ValueError(f"output {str(output)!r} holds {present[0]}/ already: name another folder")
    for name in present:
        shutil.rmtree(output / name)
    write_text(output / MARKER, json.dumps(settings, indent=1) + "\n")


def say(what: str) -> None:
    Console(stderr=True, markup=False).print(f"\n— {what}", soft_wrap=True)
