"""Surfaces of the layers' maps, for a browser."""

from __future__ import annotations

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures.labels import ticks
from stabmon.figures.surface import attention_surface
from stabmon.report.numbers import map_names
from stabmon.report.words import by_layer

MOST = 4
"""Largest number of surfaces; each is a page of 5 MB, most of it plotly itself."""


def surfaces(record: AnalysisRecord) -> dict[str, str]:
    """Draw surfaces of at most four layers of a ``heatmap`` record, heads averaged.

    Args:
        record: of kind ``heatmap``.

    Returns:
        File name -> self-contained HTML.

    Raises:
        ImportError: if plotly is not installed.
    """
    maps = by_layer(record, "maps")
    names = map_names(list(maps))
    pooled = max(max(pair) for pair in record.values["pooling"].values())
    pages = {}
    for place in ticks(len(maps), MOST):
        layer = list(maps)[place]
        title = f"Attention of {names[place]}, heads averaged"
        figure = attention_surface(maps[layer].mean(0), title=title, pooled=pooled)
        html: str = figure.to_html(include_plotlyjs=True, full_html=True)
        pages[f"heatmap_surface_{place}.html"] = html
    return pages
