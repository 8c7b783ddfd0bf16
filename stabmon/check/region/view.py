"""A stability region as a table in the terminal and as a contour plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from rich.text import Text

from stabmon.check.config import DTYPES, CheckConfig
from stabmon.check.region.region import GridPoint, OperatingPoint, grid, grid_point
from stabmon.figures.canvas import new_figure, saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = {"saturation": "S", "precision": "P", "curvature": "C", "overflow": "O"}
LEGEND = (
    "· stable, S saturated at initialisation, P too few bits, C beyond the linear regime, O "
    "overflow, [ ] this model"
)


def region_table(origin: OperatingPoint, points: Sequence[GridPoint], dtype: str) -> Table:
    """Draw a table with temperatures down, lengths and head dimensions across.

    Args:
        origin: the model's own position.
        points: the region.
        dtype: format to show.
    """
    over = (("seq_len", origin.head_dim), ("head_dim", origin.seq_len))
    halves = [dict(grid(points, dtype, across, fixed)) for across, fixed in over]
    table = Table(
        title=f"stability region in {dtype}", title_justify="left", box=None, padding=(0, 1)
    )
    table.add_column("T", justify="right")
    for half, (across, _) in zip(halves, over, strict=True):
        for each in next(iter(half.values())):
            value = int(getattr(each, across))
            table.add_column(
                short(value) if across == "seq_len" else f"D{value}", justify="center", no_wrap=True
            )
    for temperature in halves[0]:
        cells = [
            _cell(
                each,
                temperature == 1.0
                and each.head_dim == origin.head_dim
                and each.seq_len == origin.seq_len,
            )
            for half in halves
            for each in half[temperature]
        ]
        table.add_row(f"{temperature:g}" if temperature >= 1 else f"1/{1 / temperature:g}", *cells)
    table.caption, table.caption_justify = (
        Text(f"{LEGEND}; lengths at D{origin.head_dim}, D at {short(origin.seq_len)} tokens"),
        "left",
    )
    return table


def region_plot(
    origin: OperatingPoint, config: CheckConfig, path: str | Path | None = None
) -> Figure:
    """Plot the margin in bits over length and over head dimension.

    A column per format; the black line at 0 is the region's edge, the star the model.

    Args:
        origin: the model's own position.
        config: levels.
        path: file to write; None for none.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    temperatures = 2.0 ** np.arange(-8, 4.01, 0.5)
    lengths = sorted({*(2**power for power in range(7, 18)), origin.seq_len})
    widths = sorted({*(2**power for power in range(1, 9)), origin.head_dim})
    figure: Figure = new_figure(width=11, height=6.5)
    panels = figure.subplots(2, len(DTYPES), sharey=True, sharex="row")
    for column, dtype in enumerate(DTYPES):
        for row, (name, values, own) in enumerate(
            (("length", lengths, origin.seq_len), ("head dimension", widths, origin.head_dim))
        ):
            axes: Axes = panels[row, column]
            margins = np.array(
                [
                    [
                        grid_point(
                            origin,
                            t,
                            v if row else origin.head_dim,
                            origin.seq_len if row else v,
                            dtype,
                            config,
                        ).margin
                        for v in values
                    ]
                    for t in temperatures
                ]
            )
            drawn = axes.contourf(
                values,
                temperatures,
                margins,
                levels=np.arange(-8, 9, 2),
                cmap="RdYlGn",
                extend="both",
            )
            axes.contour(values, temperatures, margins, levels=[0], colors="black", linewidths=1.8)
            axes.plot(
                [own],
                [1.0],
                marker="*",
                markersize=14,
                color="white",
                markeredgecolor="black",
                linestyle="none",
            )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xlabel(name)
            if column == 0:
                axes.set_ylabel("temperature")
            if row == 0:
                axes.set_title(dtype)
    figure.suptitle("Stability region; the star is this model, the black line the edge")
    figure.colorbar(drawn, ax=list(panels.flat), label="bits to the nearest limit")
    return saved(figure, path)


def short(length: int) -> str:
    """Format a length in few characters.

    >>> short(131_072), short(100)
    ('128k', '100')
    """
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


def _cell(each: GridPoint, own: bool) -> Text:
    mark = "·" if each.stable or math.isnan(each.margin) else MARKS[each.cause]
    return Text(f"[{mark}]" if own else mark, style="green" if mark == "·" else "red")
