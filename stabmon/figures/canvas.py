"""Make, draw and save figures without pyplot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

GREY = "0.72"
"""Colour of NaN."""
MAP = "cividis"
"""Colour map of shares and probabilities, of evenly growing lightness."""
LINES: tuple[tuple[str, Any, str], ...] = (
    ("#000000", "-", "o"),
    ("#0072B2", "--", "s"),
    ("#D55E00", "-.", "^"),
    ("#009E73", ":", "D"),
    ("#CC79A7", (0, (5, 1, 1, 1)), "v"),
    ("#56B4E9", (0, (1, 1)), "P"),
    ("#8B6F00", (0, (7, 2)), "X"),
    ("#7A4FBF", (0, (3, 1, 1, 1, 1, 1)), "*"),
)
"""Colour, dash and marker of the n-th line, all different without their colour."""
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo", "--")
Drawn = TypeVar("Drawn", bound=Any)
Limits = tuple[float | None, float | None]
"""Smallest and largest value of a scale; None for the data's own."""


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure unknown to pyplot; sizes in inches.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    return _figure(width, height, "constrained")


def unlaid_figure(width: float, height: float) -> Any:
    """Return an empty figure whose axes are placed by hand; sizes in inches.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    return _figure(width, height, "none")


def _figure(width: float, height: float, layout: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "stabmon[report]"') from error
    return Figure(figsize=(width, height), layout=layout)


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    """Return an empty figure and its only axes; sizes in inches."""
    figure = new_figure(width, height)
    return figure, figure.add_subplot()


def saved(figure: Drawn, path: str | Path | None) -> Drawn:
    """Save a figure and return it.

    Args:
        figure: matplotlib's figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure.

    Raises:
        ValueError: if matplotlib does not write the suffix.
    """
    if path is not None:
        with quiet_glyphs():
            figure.savefig(path, dpi=resolution(figure))
    return figure


def drawable() -> tuple[str, ...]:
    """Return the suffixes of the files that figures can be saved to, without dots.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    canvas = new_figure(1, 1).canvas
    return tuple(sorted(canvas.get_supported_filetypes()))


def resolution(figure: Any) -> float:
    """Return the dots per inch to save a figure with: its own, at least 150."""
    return float(max(150.0, figure.dpi))


@contextmanager
def quiet_glyphs() -> Iterator[None]:
    """Suppress matplotlib's warnings on glyphs missing from all fonts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def titled(figure: Any, title: str, *notes: str) -> None:
    """Set a figure's title, with its notes on a second line; empty notes are dropped."""
    note = "; ".join(note for note in notes if note)
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=11, parse_math=False)


def legend(figure: Any) -> None:
    """Draw the legend of all axes to the right of them."""
    drawn = figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    for text in drawn.get_texts():
        text.set_parse_math(False)


def require(given: Sized, name: str) -> None:
    """Check that there is something to draw.

    Raises:
        ValueError: if ``given`` is empty.
    """
    if not len(given):
        raise ValueError(f"no {name} to draw: give at least one")


def image(
    axes: Any,
    matrix: np.ndarray,
    *,
    limits: Limits = (None, None),
    power: float = 1.0,
    cmap: str = MAP,
    aspect: str = "auto",
) -> Any:
    """Draw a matrix in exact pixels, NaN and infinities grey.

    Args:
        axes: matplotlib's axes.
        matrix: ``[rows, columns]``.
        limits: smallest and largest value of the scale; None for the matrix' own.
        power: exponent of the scale; 0.5 shows small shares beside large ones.
        cmap: matplotlib's colour map.
        aspect: ``auto`` or ``equal``.

    Returns:
        Matplotlib's image.
    """
    from matplotlib.colors import Normalize, PowerNorm

    finite = matrix[np.isfinite(matrix)]
    low = limits[0] if limits[0] is not None else float(finite.min()) if finite.size else 0.0
    high = limits[1] if limits[1] is not None else float(finite.max()) if finite.size else 1.0
    if high <= low:
        high = low + 1.0
    norm = Normalize(low, high) if power == 1.0 else PowerNorm(power, low, high)
    axes.set_facecolor(GREY)
    axes.spines[:].set_visible(False)  # they would hide part of the first and last cells
    values = np.ma.masked_invalid(matrix)
    return axes.imshow(values, norm=norm, cmap=cmap, aspect=aspect, interpolation="nearest")


def root_label(unit: str) -> str:
    """Return the label of a colour bar on a square-root scale."""
    return f"{unit}\n(square-root scale)"
