"""Images under the weights of their patches: as a picture and as HTML."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import numpy as np

from stabmon.figures.canvas import image, new_figure, saved, titled
from stabmon.figures.weights import HATCHED, highest, largest_first, weight_table


def image_figure(
    picture: np.ndarray,
    grid: np.ndarray,
    *,
    unit: str = "share",
    title: str = "Weight of every patch",
    path: str | Path | None = None,
) -> Any:
    """Draw an image beside itself under the weights of its patches.

    Args:
        picture: ``[height, width, 3]`` in [0, 1], or 0 to 255 as uint8.
        grid: ``[rows, columns]`` weights of the patches, not negative; NaN is grey.
        unit: unit of the weights.
        title: title of the figure.
        path: file to save to; None saves nothing.

    Returns:
        The figure: the image, the image darkened where weights are small, and the weights alone.

    Raises:
        ValueError: if ``picture`` has another shape.

    Example:
        >>> figure = image_figure(np.ones((4, 4, 3)), np.eye(2))
        >>> figure.axes[2].get_title()
        'weights of 2 × 2 patches'
    """
    picture, grid = _rgb(picture), np.asarray(grid, dtype=np.float64)
    height, width = picture.shape[:2]
    figure = new_figure(11.0, 1.1 + 3.3 * height / width)
    plain, over, alone = figure.subplots(1, 3)
    high = highest(grid)
    plain.imshow(picture)
    plain.set_title("image", fontsize=10)
    rows = np.arange(height) * grid.shape[0] // height
    columns = np.arange(width) * grid.shape[1] // width
    light = np.sqrt(np.clip(np.nan_to_num(grid) / high, 0.0, 1.0))[rows][:, columns, None]
    over.imshow(picture * (0.12 + 0.88 * light))
    over.set_title("image, bright where the weight is", fontsize=10)
    shown = image(alone, grid, limits=(0.0, high), aspect="equal")
    shown.set_extent((0, width, height, 0))
    alone.set_title(f"weights of {grid.shape[0]} × {grid.shape[1]} patches", fontsize=10)
    for axes in (plain, over, alone):
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(shown, ax=alone, label=unit)
    titled(figure, title)
    return saved(figure, path)


def image_html(
    picture: np.ndarray, grid: np.ndarray, *, unit: str = "share", most: int = 10
) -> str:
    """Write an image as HTML, dark where weights are small, with numbers on hover.

    Args:
        picture: ``[height, width, 3]`` in [0, 1], or 0 to 255 as uint8.
        grid: ``[rows, columns]`` weights, not negative; NaN is hatched.
        unit: unit of the weights.
        most: rows of the table.

    Returns:
        A ``<div class="patches">`` and a ``<table>``; the image is inside as a data URI.

    Raises:
        ValueError: if ``picture`` has another shape.
    """
    grid = np.asarray(grid, dtype=np.float64)
    high = highest(grid)
    source = base64.b64encode(png_of(picture)).decode()
    cells = []
    for (row, column), weight in np.ndenumerate(grid):
        style = HATCHED
        if np.isfinite(weight):
            style = f"background:rgba(0,0,0,{0.88 * (1 - np.sqrt(max(0.0, weight) / high)):.3f})"
        tip = html.escape(f"row {row}, column {column}: {weight:.4g} {unit}", quote=True)
        cells.append(f'<i style="{style}" title="{tip}"></i>')
    order = largest_first(grid, most)
    rows = [
        (str(at // grid.shape[1]), str(at % grid.shape[1]), f"{grid.flat[at]:.4g}") for at in order
    ]
    caption = f"the {len(order)} largest of {grid.size} patches"
    height, width = _rgb(picture).shape[:2]
    return (
        '<div class="patches" '
        f'style="position:relative;max-width:28rem;aspect-ratio:{width}/{height}">'
        f'<img alt="the analysed image" src="data:image/png;base64,{source}" '
        'style="width:100%;height:100%;image-rendering:pixelated;display:block">'
        '<div style="position:absolute;inset:0;display:grid;'
        f'grid-template-columns:repeat({grid.shape[1]},1fr)">{"".join(cells)}</div></div>'
        + weight_table(("row", "column", unit), rows, caption)
    )


def png_of(picture: np.ndarray) -> bytes:
    """Encode an image ``[height, width, 3]`` as PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((_rgb(picture) * 255).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _rgb(picture: np.ndarray) -> np.ndarray:
    """Scale to ``[height, width, 3]`` in [0, 1], repeating a single channel."""
    values = np.asarray(picture)
    scaled = values.astype(np.float64) / (255.0 if values.dtype == np.uint8 else 1.0)
    if scaled.ndim == 2:
        scaled = scaled[..., None]
    if scaled.ndim != 3 or scaled.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an image of shape {values.shape}: give [height, width, 3]")
    return np.clip(np.broadcast_to(scaled[..., :3], (*scaled.shape[:2], 3)), 0.0, 1.0)
