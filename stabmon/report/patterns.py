"""The page of attention patterns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import heatmaps
from stabmon.figures.pooling import block_max_by
from stabmon.report.maps import packed_maps
from stabmon.report.numbers import map_names, plural, short_layers
from stabmon.report.page import Page, Picture, Section
from stabmon.report.patterns_sections import (
    UNITS,
    advice_section,
    query_section,
    received_section,
    role_section,
    similarity_section,
    statistics_section,
)
from stabmon.report.words import by_layer, common_facts, fitting, mean_of, non_finite, tokens_of


def patterns_page(record: AnalysisRecord) -> Page:
    """Draw up the page of a ``patterns`` record.

    Args:
        record: of :func:`stabmon.analysis.patterns.result.patterns_record`, with the command's
            ``tokens`` and ``heads``.

    Returns:
        The page.
    """
    record = _narrowed(record)
    values = record.values
    layers = list(values["layers"])
    names, meaning = short_layers(layers)
    roles = list(values["roles"])
    heads = values["heads"]
    over = _named(record, "over_queries", values["over_queries_names"])
    asked = _named(record, "statistics", values["statistics_names"])
    findings = non_finite(by_layer(record, "rows"))
    sections = [
        role_section(roles, layers, names, meaning, heads),
        statistics_section(over, asked, layers, names),
        query_section(record, layers, names),
        received_section(record, layers, names),
    ]
    advice = advice_section(values)
    if advice is not None:
        sections.insert(1, advice)
    if "similarity" in record.arrays:
        sections.append(similarity_section(record, values["similarity_layers"]))
    maps = by_layer(record, "maps")
    packed = None
    if maps:
        factor = max(max(pair) for pair in values["pooling"].values())
        queries, keys = max(values["map_sizes"].values())
        tokens = tokens_of(record)
        packed = packed_maps(
            list(maps.values()),
            map_names(list(maps)),
            heads=[heads[layer] for layer in maps],
            queries=fitting(tokens, queries),
            keys=fitting(tokens, keys),
            pooled=factor,
            budget=2_000_000,
        )
        small = [block_max_by(each, -(-max(each.shape[1:]) // 128)) for each in maps.values()]
        more = -(-max(max(each.shape[1:]) for each in maps.values()) // 128)
        picture = partial(
            heatmaps.head_grid,
            small,
            short_layers(list(maps))[0],
            heads=[heads[layer] for layer in maps],
            pooled=factor * more,
        )
        caption = (
            "Attention of every head of the first sample; the scale is the same for all panels."
        )
        sections.append(Section("Every head", pictures=[Picture("heads", caption, picture)]))
    return Page(
        kind="patterns",
        title="Attention patterns",
        subject=str(values.get("model", "")),
        verdict=_verdict(values, roles),
        findings=findings,
        facts=common_facts(record),
        sections=sections,
        maps=packed,
        notes=[str(note) for note in values.get("notes", ())],
        numbers={
            "roles": _counts(roles),
            "insights": [insight["text"] for insight in values["insights"]],
            "recommendations": list(values["recommendations"]),
            "layers": {
                layer: {
                    name: mean_of(over[layer][name]).item() for name in UNITS if name in over[layer]
                }
                for layer in layers
            },
        },
    )


def _named(record: AnalysisRecord, what: str, names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    return {
        layer: dict(zip(names, table, strict=True))
        for layer, table in by_layer(record, what).items()
    }


def _narrowed(record: AnalysisRecord) -> AnalysisRecord:
    """Return the record of the chosen heads alone; ``heads`` maps layers to numbers."""
    values, arrays = record.values, dict(record.arrays)
    layers = list(values["layers"])
    every = {layer: list(range(arrays[f"rows/{layer}"].shape[1])) for layer in layers}
    chosen = values.get("heads")
    if not chosen:
        return AnalysisRecord(record.kind, {**values, "heads": every}, arrays)
    axis_of = {"statistics": 2, "over_queries": 2, "rows": 1, "received": 1, "maps": 0}
    for name, array in record.arrays.items():
        axis = axis_of.get(name.partition("/")[0])
        if axis is not None:
            arrays[name] = np.take(array, chosen, axis=axis)
    roles = [role for role in values["roles"] if role["head"] in chosen]
    heads = {layer: list(chosen) for layer in layers}
    return AnalysisRecord(record.kind, {**values, "roles": roles, "heads": heads}, arrays)


def _counts(roles: list[Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for role in roles:
        counts[role["role"]] = counts.get(role["role"], 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _verdict(values: Mapping[str, Any], roles: list[Mapping[str, Any]]) -> list[str]:
    total = len({(role["layer"], role["head"]) for role in roles})
    said = []
    if roles:
        parts = [f"{count} {name.replace('_', ' ')}" for name, count in _counts(roles).items()]
        said.append(f"Roles of {plural(total, 'head')}, some with several: {', '.join(parts)}.")
    said += [str(insight["text"]) for insight in values["insights"]]
    if not values["insights"]:
        said.append("Nothing stands out by the levels that insights are held against.")
    for each in values["recommendations"]:
        said.append(f"Compression: {each['text']}")
    if not values["recommendations"] and values["rejected"]:
        said.append(
            "Compression: no way of shortening the cache that was tried keeps the loss; see below."
        )
    return said
