"""Sections of the page of attention patterns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import distributions, lines, tables
from stabmon.report.numbers import number, percent, plural, short_layers
from stabmon.report.page import Picture, Section, Table
from stabmon.report.words import fitting, mean_of, stacked, tokens_of

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
    "?": "unknown: the text is too short",
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
"""Largest number of rows in the table of roles; the JSON holds all."""
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
"""Unit, scale and title of the drawn statistics."""


def role_section(
    roles: list[Mapping[str, Any]],
    layers: list[str],
    names: list[str],
    meaning: str,
    heads: Mapping[str, list[int]],
) -> Section:
    """Show the role of every head as a letter, and the weight that proves it."""
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


def advice_section(values: Mapping[str, Any]) -> Section | None:
    """Report the cost of shortening the KV cache; None if nothing was tried."""
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
        "beside it what keeping the newest and keeping random keys costs at the same size.",
        ("policy", "keys kept", "of", "cost", "standard error", "recency", "random", "verdict"),
        rows,
    )
    said = (
        "Each way of shortening the KV cache was tried on the model's own loss; it is advised "
        "where it costs at most 0.01 nats."
    )
    return Section("Can the cache be shorter?", [said], [table])


def statistics_section(
    over: Mapping[str, Mapping[str, np.ndarray]],
    asked: Mapping[str, Mapping[str, np.ndarray]],
    layers: list[str],
    names: list[str],
) -> Section:
    """Draw statistics over all queries ``over``, and list those of the asked query."""
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


def query_section(record: AnalysisRecord, layers: list[str], names: list[str]) -> Section:
    """Draw the asked query's weights in up to six layers."""
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


def received_section(record: AnalysisRecord, layers: list[str], names: list[str]) -> Section:
    """Draw the attention that every key receives."""
    received = []
    for layer in layers:
        seen = np.maximum(record.arrays[f"seen_by/{layer}"][0], 1)
        received.append(mean_of(record.arrays[f"received/{layer}"][0], 0) / seen)
    matrix = stacked(received)
    labels = [f"layer {name}" if len(layers) <= 8 else name for name in names]
    picture = partial(lines.received_attention, matrix, labels)
    caption = (
        "Weight that each key of the first sample receives, averaged over heads and over the "
        "queries that see it; without the last division keys at the start of a causal model would "
        "seem important for being seen often."
    )
    return Section("Received attention", pictures=[Picture("received", caption, picture)])


def similarity_section(record: AnalysisRecord, layers: list[str]) -> Section:
    """Draw the similarity of all pairs of layers."""
    names, _ = short_layers(list(layers))
    matrix = mean_of(record.arrays["similarity"], 0)
    picture = partial(tables.similarity_matrix, matrix, names)
    caption = (
        "Cosine of the layers' maps, heads averaged, over valid queries; 1 means that two "
        "layers look at the same keys."
    )
    return Section("How alike the layers are", pictures=[Picture("similarity", caption, picture)])
