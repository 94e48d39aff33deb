"""The command line of a study on SmolLM2."""

import argparse
from pathlib import Path

from autodeco_fast.demo import smollm2


def parsed(page: str, folder: str, arguments: list[str] | None) -> argparse.Namespace:
    """`folder`, made, and `model`.

    Args:
        page: the script's docstring, which the help begins with.
        folder: what is kept in the folder.
    """
    parser = argparse.ArgumentParser(description=page.split("\n")[0])
    parser.add_argument("folder", type=Path, help=folder)
    parser.add_argument("--model", help="by default SmolLM2 from its package")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    args.model = args.model or str(smollm2.folder())
    return args
