"""The page of patterns over checkpoints, stored readings or the steps of a generation."""

from __future__ import annotations

from functools import partial

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import lines
from stabmon.report.maps import packed_maps
from stabmon.report.numbers import number, percent, plural, short_layers
from stabmon.report.page import Page, Picture, Section, Table
from stabmon.report.words import by_layer, common_facts, fitting, mean_of, non_finite, tokens_of

UNITS = {
    "normalized_entropy": ("entropy / ln n", (0.0, 1.0)),
    "sink_mass": ("share of the weight on the first key", (0.0, 1.0)),
    "recent_share": ("newest / (newest + oldest quarter)", (0.0, 1.0)),
    "mean_distance": ("tokens", (0.0, None)),
}
STEPS = {
    "checkpoints": "training step",
    "training": "optimizer step",
    "generation": "generation step",
}


def evolution_page(record: AnalysisRecord) -> Page:
    """Draw up the page of an ``evolution`` record.

    Args:
        record: of :meth:`stabmon.analysis.patterns.evolution.PatternEvolution.to_record`.

    Returns:
        The page.
    """
    values = record.values
    layers, steps = list(values["layers"]), list(values["steps"])
    names, meaning = short_layers(layers)
    step_name = STEPS.get(str(values["over"]), "step")
    tables = _series(record, layers)
    rows = by_layer(record, "rows")
    pictures = []
    for name, series in tables.items():
        unit, limits = UNITS[name]
        title = f"{name.replace('_', ' ').capitalize()} of every layer over the {step_name}s"
        found = {f"layer {short}": series[at] for at, short in enumerate(names)}
        draw = partial(
            lines.over_time,
            steps,
            found,
            unit=unit,
            title=title,
            step_name=step_name,
            limits=limits,
        )
        pictures.append(Picture(name, f"{title}, samples and heads averaged.", draw))
    sections = [Section("Statistics over time", [meaning] if meaning else [], (), pictures)]
    packed = None
    if rows:
        shown = {layer: each[:, 0] for layer, each in rows.items()}
        middle = list(shown)[len(shown) // 2]
        draw = partial(
            lines.positions_over_time,
            shown[middle],
            steps=steps,
            tokens=tokens_of(record),
            unit="attention probability, mean over heads",
            title=f"Where the query looks in {middle}",
            step_name=step_name,
        )
        caption = "Each row is a step; the first sample. The map above shows every layer."
        sections.append(Section("Where the query looks", pictures=[Picture("rows", caption, draw)]))
        packed = packed_maps(
            [each[None] for each in shown.values()],
            [f"layer {short_of}" for short_of in short_layers(list(shown))[0]],
            queries=[f"{step_name} {step}" for step in steps],
            keys=fitting(tokens_of(record), next(iter(shown.values())).shape[1]),
            title=f"Each layer's row over the {step_name}s",
        )
    head = ("layer", *(f"{name.replace('_', ' ')}: first to last" for name in tables))
    moves = [
        (short, *(f"{number(each[at][0])} → {number(each[at][-1])}" for each in tables.values()))
        for at, short in enumerate(names)
    ]
    sections.append(Section("From the first step to the last", tables=[Table("", head, moves)]))
    return Page(
        kind="evolution",
        title="Attention over time",
        subject=str(values.get("model", "")),
        verdict=_verdict(tables, names, steps, step_name),
        findings=non_finite(
            {layer: each[~np.isnan(each).all(-1)][..., 0] for layer, each in rows.items()}
        ),
        facts=common_facts(record),
        sections=sections,
        maps=packed,
        notes=[str(note) for note in values.get("notes", ())],
        numbers={"steps": steps, **{name: each.tolist() for name, each in tables.items()}},
    )


def _series(record: AnalysisRecord, layers: list[str]) -> dict[str, np.ndarray]:
    """Return statistic -> ``[L, T]``, averaged over samples and heads."""
    values = record.values
    group, key = "over_queries", "over_queries_names"
    if not values.get(key):
        group, key = "statistics", "names"
    names = list(values[key])
    found = {}
    for name in UNITS:
        if name in names:
            at = names.index(name)
            found[name] = np.array(
                [mean_of(record.arrays[f"{group}/{layer}"][at], (1, 2)) for layer in layers]
            )
    return found


def _verdict(
    tables: dict[str, np.ndarray], names: list[str], steps: list[int], step_name: str
) -> list[str]:
    said = [
        f"{plural(len(names), 'layer')} over {plural(len(steps), step_name)}, {steps[0]} to "
        f"{steps[-1]}."
    ]
    for name, series in tables.items():
        change = series[:, -1] - series[:, 0]
        if not np.isfinite(change).any():
            continue
        at = int(np.nanargmax(np.abs(change)))
        share = UNITS[name][1] == (0.0, 1.0)
        ends = [
            percent(float(x)) if share else number(float(x))
            for x in (series[at, 0], series[at, -1])
        ]
        said.append(
            f"{name.replace('_', ' ').capitalize()} moves most in layer {names[at]}: from "
            f"{ends[0]} to {ends[1]}."
        )
    return said
