"""Predicted temperatures in a file, a line of JSON a token.

    {"id": "my-request", "index": 0, "temperature": 0.731}

`id` is what the request gave as `autodeco_log`, `index` counts its new tokens from 0, `temperature`
is the T that the logits were divided by, factor and range included. A request's lines come in the
order of its tokens; of several lines with the same index the last one holds (a prompt that is
computed in several steps writes one at the end of each).
"""

import json
from pathlib import Path

from autodeco_fast.files import append_text


class TemperatureLog:
    """Appends to a file.

    Raises:
        ValueError: if it cannot be written.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        try:
            append_text(self.path, "")
        except OSError as error:
            raise ValueError(f"autodeco_log {path!r} cannot be written: {error}") from None

    def write(self, lines: list[tuple[str, int, float]]) -> None:
        """Appends lines of id, index and temperature, all of them or none."""
        entries = (
            {"id": key, "index": index, "temperature": round(T, 6)} for key, index, T in lines
        )
        append_text(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))
