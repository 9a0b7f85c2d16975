"""What the package's figures share. matplotlib is optional: `pip install hf-lottalora[plot]`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by colour-blind readers too.
COLOURS, MARKERS, GREY = ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), "osD^vP", "#6b7280"


@contextmanager
def drawing(axes: Axes | None, path: str | Path | None, title: str) -> Iterator[Axes]:
    """Axes to draw into, given or of a new figure that no backend shows; written to `path` afterwards.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    axes = axes or Figure(figsize=(7, 4.2), layout="constrained").subplots()
    yield axes
    axes.set_title(title, loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        axes.get_figure().savefig(path, dpi=150)  # type: ignore[union-attr]
