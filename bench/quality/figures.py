"""The studies' figures."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autodeco_fast.files import atomic_write


@contextmanager
def figure(
    path: Path, size: tuple[float, float], columns: int = 1, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, one or an array of them; a PNG once the block ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(made)
    yield made, made.subplots(1, columns, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda draft: made.savefig(draft, dpi=140, format="png"))
