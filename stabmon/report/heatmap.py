"""The page of attention maps."""

from __future__ import annotations

from functools import partial

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import heatmaps
from stabmon.report.maps import packed_maps
from stabmon.report.numbers import map_names, number, percent, plural, short_layers
from stabmon.report.page import Page, Picture, Section, Table
from stabmon.report.words import by_layer, common_facts, fitting, non_finite, tokens_of

SINK = 0.3
"""Mean weight on the first key from which a head is called a sink.

Gu et al. 2024, "When Attention Sink Emerges in Language Models", arXiv:2410.10781.
"""


def heatmap_page(record: AnalysisRecord) -> Page:
    """Draw up the page of a ``heatmap`` record.

    Args:
        record: of :meth:`stabmon.analysis.patterns.maps.AttentionMaps.to_record`, with the
            command's ``tokens``, ``heads`` and ``layer`` (shown first).

    Returns:
        The page.
    """
    maps = by_layer(record, "maps")
    layers = list(maps)
    names, meaning = short_layers(layers)
    arrays = [maps[layer] for layer in layers]
    chosen = record.values.get("heads")
    heads = [list(chosen) if chosen else list(range(each.shape[0])) for each in arrays]
    factor = max(max(pair) for pair in record.values["pooling"].values())
    queries, keys = max(record.values["sizes"].values())
    tokens = tokens_of(record, int(record.values.get("sample", 0)))
    rows = [
        _row(name, each, factor, heads[at])
        for at, (name, each) in enumerate(zip(names, arrays, strict=True))
    ]
    first = record.values.get("layer")
    packed = packed_maps(
        arrays,
        map_names(layers),
        heads=heads,
        queries=fitting(tokens, queries),
        keys=fitting(tokens, keys),
        pooled=factor,
        layer=layers.index(first) if first in layers else None,
    )
    grid = Picture(
        "heads",
        f"Attention of every head, layers downwards, heads across, {queries} queries × {keys} "
        "keys. "
        "Bright cells are large weights; the scale is the same for all panels.",
        partial(heatmaps.head_grid, arrays, names, heads=heads, pooled=factor),
    )
    mean = Picture(
        "layers",
        "Attention of every layer, averaged over its heads.",
        partial(heatmaps.layer_grid, [each.mean(0) for each in arrays], names, pooled=factor),
    )
    table = Table(
        "Every layer, heads averaged; largest weight over all pairs of positions.",
        (
            "layer",
            "heads",
            "weight on the first key",
            "on the key before",
            "on itself",
            "largest weight",
        ),
        [row[1] for row in rows],
    )
    return Page(
        kind="heatmap",
        title="Attention maps",
        subject=str(record.values.get("model", "")),
        verdict=_verdict(arrays, rows, factor, queries, keys),
        findings=non_finite(maps),
        facts=common_facts(record),
        sections=[
            Section("Every head", [meaning] if meaning else [], [table], [grid]),
            Section("Layers side by side", pictures=[mean]),
        ],
        maps=packed,
        notes=[str(note) for note in record.values.get("notes", ())],
        numbers={
            "layers": {
                layer: dict(
                    zip(("first_key", "previous_key", "own_key", "largest"), row[0], strict=True)
                )
                for layer, row in zip(layers, rows, strict=True)
            }
        },
    )


def _row(
    name: str, maps: np.ndarray, factor: int, heads: list[int]
) -> tuple[list[float], list[str]]:
    """Return the mean weight on the first, previous and own key, and the largest weight."""
    seen = np.nansum(maps, axis=(0, 2)) > 0
    square = maps.shape[1] == maps.shape[2] and factor == 1
    first = float(maps[:, seen, 0].mean()) if factor == 1 and seen.any() else np.nan
    before = float(maps.diagonal(-1, 1, 2).mean()) if square and maps.shape[1] > 1 else np.nan
    own = float(maps.diagonal(0, 1, 2).mean()) if square else np.nan
    largest = float(np.nanmax(maps)) if np.isfinite(maps).any() else np.nan
    values = [first, before, own, largest]
    return values, [
        name,
        str(len(heads)),
        *(percent(value) for value in values[:3]),
        number(largest),
    ]


def _verdict(
    arrays: list[np.ndarray],
    rows: list[tuple[list[float], list[str]]],
    factor: int,
    queries: int,
    keys: int,
) -> list[str]:
    total = sum(each.shape[0] for each in arrays)
    said = [
        f"{plural(total, 'head')} in {plural(len(arrays), 'layer')}, {queries:,} queries × "
        f"{keys:,} keys of one sample."
    ]
    if factor > 1:
        said.append(
            f"The maps are pooled: a cell is the largest weight of {factor} × {factor} pairs, so "
            "that cells do not sum to 1 along a row."
        )
        return said
    sinks = sum(
        int(
            (
                np.nan_to_num(each[:, :, 0]).sum(1) / np.maximum((each.sum(2) > 0).sum(1), 1)
                >= SINK
            ).sum()
        )
        for each in arrays
    )
    mean = np.nanmean([row[0][0] for row in rows])
    said.append(
        f"The first key gets {percent(float(mean))} of the weight on average, and at least "
        f"{percent(SINK)} in {plural(sinks, 'head')}"
        + (": an attention sink, which most trained language models have." if sinks else ".")
    )
    before = [row[0][1] for row in rows if not np.isnan(row[0][1])]
    if before:
        at = int(np.argmax([-1 if np.isnan(row[0][1]) else row[0][1] for row in rows]))
        said.append(
            f"The key just before the query gets {percent(float(np.mean(before)))} on average, "
            f"most in layer {rows[at][1][0]} ({percent(rows[at][0][1])})."
        )
    return said
