"""Predicted temperatures in a file, a line of JSON a token.

    {"id": "my-request", "index": 0, "temperature": 0.731}

`id` is what the request gave as `autodeco_log`, `index` counts its new tokens from 0, `temperature`
is the T that the logits were divided by, factor and range included. A request's lines come in the
order of its tokens; of several lines with the same index the last one holds (in vLLM's V1 runner a
prompt that is computed in several steps writes one at the end of each).
"""

import json
import logging
from pathlib import Path

from autodeco_fast.errors import line
from autodeco_fast.files import append_text

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows what is said below its own


class TemperatureLog:
    """Appends to a file.

    Raises:
        ValueError: if it cannot be written.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self.is_open = True  # until a line cannot be written
        try:
            append_text(self.path, "")
        except OSError as error:
            raise ValueError(f"autodeco_log {path!r} cannot be written: {error}") from None

    def write(self, lines: list[tuple[str, int, float]]) -> None:
        """Appends lines of id, index and temperature, all of them or none.

        A full disk is no reason to end a server: it is told once, and no more is written.
        """
        if not self.is_open:
            return
        entries = (
            {"id": key, "index": index, "temperature": round(T, 6)} for key, index, T in lines
        )
        try:
            append_text(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))
        except OSError as error:
            self.is_open = False
            logger.error(
                "autodeco_log %s cannot be written: %s. Requests go on; their temperatures are not "
                "logged any more until the server is started again",
                self.path,
                line(error),
            )
