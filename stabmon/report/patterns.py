"""The page of attention patterns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import distributions, heatmaps, lines, tables
from stabmon.figures.pooling import block_max_by
from stabmon.report.maps import packed_maps
from stabmon.report.page import Page, Picture, Section, Table
from stabmon.report.words import (
    by_layer,
    common_facts,
    fitting,
    map_names,
    mean_of,
    non_finite,
    number,
    percent,
    plural,
    short_layers,
    stacked,
    tokens_of,
)

LETTERS = {
    "S": "sink: the first key that is seen",
    "P": "previous token",
    "I": "induction: what followed the token before",
    "D": "duplicate: the same token before",
    "L": "local: a band of the newest keys",
    "O": "another fixed offset",
    "=": "itself",
    "U": "uniform: all keys alike",
    "M": "mixed: no role, or two that compete",
    "C": "a role of the caller's",
    "?": "not told: the text is too short",
}
_LETTER_OF = {
    "sink": "S",
    "previous_token": "P",
    "induction": "I",
    "duplicate_token": "D",
    "local": "L",
    "self": "=",
    "uniform": "U",
    "mixed": "M",
}
MOST_ROWS = 400
"""Rows of the table of roles; all are in the JSON."""
UNITS = {
    "normalized_entropy": ("entropy / ln n, in [0, 1]", (0.0, 1.0), "Entropy of every head's rows"),
    "sink_mass": ("share of the weight", (0.0, 1.0), "Weight on the first key that is seen"),
    "recent_share": (
        "newest / (newest + oldest quarter)",
        (0.0, 1.0),
        "How much recent keys are preferred",
    ),
    "mean_distance": ("tokens", (0.0, None), "Mean distance of query and key"),
}
"""Statistics that are drawn: unit, scale and title."""


def patterns_page(record: AnalysisRecord) -> Page:
    """Draw up the page of a ``patterns`` record.

    Args:
        record: of :func:`stabmon.analysis.patterns.result.patterns_record`, with what the command
            adds: ``tokens`` and ``heads``.
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
        _roles(roles, layers, names, meaning, heads),
        _statistics(over, asked, layers, names),
        _query(record, layers, names),
        _received(record, layers, names),
    ]
    advice = _advice(values)
    if advice is not None:
        sections.insert(1, advice)
    if "similarity" in record.arrays:
        sections.append(_similarity(record, values["similarity_layers"]))
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
    """The record of the heads that were chosen alone; ``heads`` becomes layer -> their numbers."""
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


def _roles(
    roles: list[Mapping[str, Any]],
    layers: list[str],
    names: list[str],
    meaning: str,
    heads: Mapping[str, list[int]],
) -> Section:
    found: dict[tuple[str, int], list[str]] = {}
    for role in roles:
        name = str(role["role"])
        offset = name.startswith("offset_")
        letter = "O" if offset else _LETTER_OF.get(name, "C")
        found.setdefault((role["layer"], role["head"]), []).append(letter)
    grid = [
        ["".join(dict.fromkeys(found.get((layer, head), ["?"])))[:2] for head in heads[layer]]
        for layer in layers
    ]
    columns = [str(head) for head in max(heads.values(), key=len)]
    picture = partial(
        tables.letter_map, grid, names, LETTERS, columns=columns, title="Role of every head"
    )
    short = dict(zip(layers, names, strict=True))
    order = sorted(roles, key=lambda role: -np.nan_to_num(_mass(role)))
    rows = [
        (
            short.get(role["layer"], role["layer"]),
            str(role["head"]),
            str(role["role"]).replace("_", " "),
            percent(_mass(role)),
            percent(_mass(role, "expected")),
            number(role["evidence"].get("rows")),
        )
        for role in order[:MOST_ROWS]
    ]
    note = "" if len(order) <= MOST_ROWS else f", the {MOST_ROWS} clearest of {len(order)}"
    table = Table(
        f"The weight that proves each role{note}. Evenly: the same of a head that attends to all "
        "keys alike.",
        ("layer", "head", "role", "weight on the role's keys", "evenly", "rows tested"),
        rows,
    )
    untested = sorted(
        {
            f"{name.replace('_', ' ')}: {reason}"
            for role in roles
            for name, reason in (role["evidence"].get("not_testable") or {}).items()
        }
    )
    said = [meaning] if meaning else []
    said += [f"Not testable on this text: {'; '.join(untested)}."] if untested else []
    caption = (
        "The role of every head, as a letter; two letters where it has two. Darker tones: "
        "roles with a fixed place."
    )
    return Section("What each head does", said, [table], [Picture("roles", caption, picture)])


def _mass(role: Mapping[str, Any], name: str = "mass") -> float:
    mass = role["evidence"].get(name)
    return float("nan") if mass is None else float(mass)


def _advice(values: Mapping[str, Any]) -> Section | None:
    tried = [(each, "advised") for each in values["recommendations"]]
    tried += [
        (each, str(each.get("reason", "") or "costs too much")) for each in values["rejected"]
    ]
    if not tried:
        return None
    rows = [
        (
            str(each.get("policy", "")).replace("_", " "),
            number(each.get("keep")),
            number(each.get("context")),
            number(each.get("cost")),
            number(each.get("standard_error")),
            number(each.get("recency_cost")),
            number(each.get("random_cost")),
            verdict,
        )
        for each, verdict in tried
    ]
    table = Table(
        "Cost: mean loss with the shortened context less that with all of it, in nats a token; "
        "beside it what "
        "keeping the newest and keeping random keys costs at the same size.",
        ("policy", "keys kept", "of", "cost", "standard error", "recency", "random", "verdict"),
        rows,
    )
    said = (
        "Each way of shortening the KV cache was tried on the model's own loss; it is advised "
        "where it costs at most 0.01 nats."
    )
    return Section("Can the cache be shorter?", [said], [table])


def _statistics(
    over: Mapping[str, Mapping[str, np.ndarray]],
    asked: Mapping[str, Mapping[str, np.ndarray]],
    layers: list[str],
    names: list[str],
) -> Section:
    pictures = []
    first = over[layers[0]]
    for name, (unit, limits, title) in UNITS.items():
        if name not in first:
            continue
        table = stacked(mean_of(over[layer][name], 0) for layer in layers)
        if not np.isfinite(table).any():
            continue
        picture = partial(
            distributions.over_layers, table, names, unit=unit, title=title, limits=limits
        )
        caption = (
            f"{title}, mean over valid queries and samples: a circle a head, a line through "
            "the layers' means."
        )
        pictures.append(Picture(name, caption, picture))
    samples = first["entropy"].shape[0]
    if samples >= 4 and "normalized_entropy" in first:
        groups = {
            name: mean_of(over[layer]["normalized_entropy"], 1)
            for name, layer in zip(names, layers, strict=True)
        }
        picture = partial(
            distributions.distributions,
            groups,
            unit="entropy / ln n",
            title="Entropy over the samples",
            limits=(0.0, 1.0),
        )
        caption = (
            f"How the entropy of each layer, heads averaged, differs between the {samples} samples."
        )
        pictures.append(Picture("samples", caption, picture))
    shown = [
        name
        for name in (
            "entropy",
            "normalized_entropy",
            "std",
            "max",
            "recent_distant_ratio",
            "sink_mass",
        )
        if name in asked[layers[0]]
    ]
    rows = [
        (short, *(number(float(mean_of(asked[layer][name]))) for name in shown))
        for short, layer in zip(names, layers, strict=True)
    ]
    asked_table = Table(
        "The asked query's context, averaged over samples and heads; entropy in nats.",
        ("layer", *(name.replace("_", " ") for name in shown)),
        rows,
    )
    return Section("Statistics over layers", tables=[asked_table], pictures=pictures)


def _query(record: AnalysisRecord, layers: list[str], names: list[str]) -> Section:
    tokens = tokens_of(record)
    widths = [record.arrays[f"rows/{layer}"].shape[2] for layer in layers]
    same = [at for at, width in enumerate(widths) if width == widths[0]]
    chosen = [same[i] for i in np.unique(np.linspace(0, len(same) - 1, 6).round().astype(int))]
    rows = {
        f"layer {names[at]}": mean_of(record.arrays[f"rows/{layers[at]}"][0], 0) for at in chosen
    }
    position = int(record.arrays[f"positions/{layers[0]}"][0])
    title = f"Where the query at position {position} looks, heads averaged"
    picture = partial(
        lines.query_row,
        rows,
        tokens=fitting(tokens, widths[0]),
        title=title,
        unit="attention probability",
    )
    where = f" (token “{tokens[position]}”)" if tokens and 0 <= position < len(tokens) else ""
    caption = (
        f"Weights of the query at position {position}{where} of the first sample, in "
        f"{plural(len(chosen), 'layer')}."
    )
    return Section("The asked query", pictures=[Picture("query", caption, picture)])


def _received(record: AnalysisRecord, layers: list[str], names: list[str]) -> Section:
    received = []
    for layer in layers:
        seen = np.maximum(record.arrays[f"seen_by/{layer}"][0], 1)
        received.append(mean_of(record.arrays[f"received/{layer}"][0], 0) / seen)
    matrix = stacked(received)
    labels = [f"layer {name}" if len(layers) <= 8 else name for name in names]
    picture = partial(lines.received_attention, matrix, labels)
    caption = (
        "Weight that each key of the first sample receives, averaged over heads and over the "
        "queries that see it; "
        "without the last division keys at the start of a causal model would seem important for "
        "being seen often."
    )
    return Section("Received attention", pictures=[Picture("received", caption, picture)])


def _similarity(record: AnalysisRecord, layers: list[str]) -> Section:
    names, _ = short_layers(list(layers))
    matrix = mean_of(record.arrays["similarity"], 0)
    picture = partial(tables.similarity_matrix, matrix, names)
    caption = (
        "Cosine of the layers' maps, heads averaged, over valid queries; 1 means that two "
        "layers look at the same keys."
    )
    return Section("How alike the layers are", pictures=[Picture("similarity", caption, picture)])
