"""The page of a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import heatmaps, images, lines, texts
from stabmon.figures.labels import plain_token
from stabmon.figures.pooling import block_max
from stabmon.report.maps import packed_maps
from stabmon.report.page import Finding, Page, Picture, Section, Table
from stabmon.report.words import (
    common_facts,
    non_finite,
    number,
    percent,
    plural,
    tokens_of,
)

MISLEADS = 0.5
"""Mean share of the first token from which a rollout says little about the other tokens."""
MOST_SAMPLES = 6
"""Samples that are drawn; the numbers of all are stored."""
SIDE = 512


def rollout_page(record: AnalysisRecord) -> Page:
    """Draw up the page of a ``rollout`` record.

    Args:
        record: of :meth:`stabmon.analysis.rollout.result.Rollout.to_record`, with what the command
            adds: ``tokens`` and, of vision models, the array ``images`` ``[B, height, width, 3]``.
    """
    values, matrix = record.values, record.arrays["matrix"]
    shares = np.asarray(values["first_token_share"], dtype=np.float64)
    rows = [_row(record, sample) for sample in range(len(matrix))]
    grid = values.get("image_grid")
    sections = []
    if grid:
        sections.append(_images(record, grid, rows))
    else:
        sections.append(_texts(record, rows))
    if matrix.shape[1] > 1:
        sections.append(_matrix(record))
    sections.append(_first_token(record, shares, rows))
    sections += _numbers(values)
    findings = non_finite({"the rollout": matrix[_valid_rows(record)]})
    own = float(np.nanmean([shares[sample, row[1]] for sample, row in enumerate(rows)]))
    if not grid and own >= MISLEADS:
        findings.append(
            Finding(
                "warning",
                "first_token",
                f"{percent(own)} of what the target owes is owed to the first token. Rollout "
                "drifts there with depth whatever "
                "the text says, so that this picture says little about the other tokens: use "
                "--weighting gradient, "
                "fewer layers (--layers), or look at single layers (--kind heatmap).",
            )
        )
    findings += _faithfulness_findings(values.get("faithfulness"))
    packed = None
    if matrix.shape[1] > 1 and not grid:
        pooled, factor = block_max(matrix[0], SIDE)
        tokens = tokens_of(record)
        same = tokens if tokens and len(tokens) == matrix.shape[2] == matrix.shape[1] else None
        packed = packed_maps(
            [pooled[None]],
            ["rollout"],
            queries=same,
            keys=same,
            pooled=factor,
            unit="share owed",
            title="Rollout of the first sample",
        )
    return Page(
        kind="rollout",
        title="Attention rollout",
        subject=str(values.get("model", "")),
        verdict=_verdict(record, rows, shares, grid),
        findings=findings,
        facts=[
            *common_facts(record),
            ("method", str(values["method"])),
            ("stack", str(values["stack"])),
        ],
        sections=sections,
        maps=packed,
        notes=[str(note) for note in values.get("notes", ())],
        numbers={
            "method": values["method"],
            "first_token_share": shares.tolist(),
            "attribution": values.get("attribution"),
            "faithfulness": values.get("faithfulness"),
            "samples": [
                {"target": row[0], "owed_most": _top(record, sample, row[2])}
                for sample, row in enumerate(rows)
            ],
        },
    )


def terminal_overlay(record: AnalysisRecord, most: int = 600) -> Any:
    """Write the first sample's tokens with their shares for a terminal; None of images.

    Args:
        record: as :func:`rollout_page` takes it.
        most: tokens; of a longer text nothing is written.
    """
    columns = tokens_of(record)
    position, _, weights = _row(record, 0)
    if columns is None or len(columns) != len(weights) or len(columns) > most:
        return None
    return texts.text_terminal(columns, weights, marked=position if position >= 0 else None)


def _valid_rows(record: AnalysisRecord) -> np.ndarray:
    """Which rows mean something, ``[B, T]``."""
    valid = record.arrays["valid"].astype(bool)
    targets = record.values.get("targets")
    if targets is None:
        return valid[:, : record.arrays["matrix"].shape[1]]
    return np.take_along_axis(valid, np.asarray(targets), axis=1)


def _row(record: AnalysisRecord, sample: int) -> tuple[int, int, np.ndarray]:
    """The row of a sample that is shown first: position, place in the matrix, and its weights.

    The last target; the last valid row of a text; of an image the class token, or without one the
    mean over the patches (position -1).
    """
    matrix, values = record.arrays["matrix"][sample], record.values
    grid, targets = values.get("image_grid"), values.get("targets")
    if targets is not None:
        return int(targets[sample][-1]), matrix.shape[0] - 1, matrix[-1]
    if grid and grid["leading"]:
        return 0, 0, matrix[0]
    if grid:
        return -1, 0, matrix.mean(0)
    valid = np.flatnonzero(record.arrays["valid"][sample])
    at = int(valid[-1]) if len(valid) else matrix.shape[0] - 1
    return at, at, matrix[at]


def _columns(record: AnalysisRecord, sample: int) -> list[str]:
    """The names of the columns: tokens, or positions."""
    width = record.arrays["matrix"].shape[2]
    sources = record.values.get("sources")
    tokens = tokens_of(record, sample)
    if sources is not None:
        places = [int(place) for place in sources[sample]]
        return [tokens[place] if tokens and place < len(tokens) else str(place) for place in places]
    return tokens if tokens and len(tokens) == width else [str(place) for place in range(width)]


def _top(
    record: AnalysisRecord, sample: int, weights: np.ndarray, most: int = 5
) -> list[dict[str, Any]]:
    columns = _columns(record, sample)
    order = np.argsort(-np.nan_to_num(weights), kind="stable")[:most]
    return [
        {"position": int(at), "token": columns[at], "share": float(weights[at])} for at in order
    ]


def _verdict(
    record: AnalysisRecord,
    rows: list[tuple[int, int, np.ndarray]],
    shares: np.ndarray,
    grid: Mapping[str, int] | None,
) -> list[str]:
    values = record.values
    names = values["layers"]
    said = [
        f"How much each token after {plural(len(names), 'layer')} owes to each token of the "
        f"input: {values['method']}. "
        "Shares of a row sum to 1."
    ]
    position, _, weights = rows[0]
    if grid:
        patches = weights[grid["leading"] :]
        best = int(np.nanargmax(patches)) if np.isfinite(patches).any() else 0
        who = (
            "The class token"
            if position == 0 and grid["leading"]
            else "A token"
            if position < 0
            else f"Token {position}"
        )
        share = float(np.nansum(patches))
        said.append(
            f"{who} of the first image owes {percent(share)} to the patches, most to the one in "
            f"row {best // grid['cols']}, "
            f"column {best % grid['cols']} ({percent(float(patches[best]))}; evenly it would be "
            f"{percent(share / len(patches))})."
        )
        return said
    columns = _columns(record, 0)
    parts = [
        f"“{plain_token(each['token'], 30)}” at {each['position']} ({percent(each['share'])})"
        for each in _top(record, 0, weights, 4)
    ]
    own = columns[position] if position < len(columns) and values.get("stack") != "joined" else ""
    named = f" (“{plain_token(own, 30)}”)" if own and own != str(position) else ""
    said.append(
        f"In the first sample the token at position {position}{named} owes most to "
        f"{', '.join(parts)}."
    )
    first = np.array([shares[sample, row[1]] for sample, row in enumerate(rows)])
    said.append(
        f"The first token alone gets {percent(float(np.nanmean(first)))}"
        + (f", averaged over {len(first)} samples." if len(first) > 1 else ".")
        + _baseline(record, position)
    )
    return said


def _baseline(record: AnalysisRecord, position: int) -> str:
    """Describe the first token's share under even causal attention."""
    matrix = record.arrays["matrix"]
    valid, values = record.arrays["valid"][0], record.values
    targets = values.get("targets")
    places = np.asarray(targets[0]) if targets is not None else np.arange(matrix.shape[1])
    if matrix.shape[2] != record.arrays["valid"].shape[1] or values.get("sources") is not None:
        return ""
    ahead = np.arange(matrix.shape[2])[None] > places[:, None]
    if np.nan_to_num(matrix[0])[ahead].any() or not len(valid):
        return ""
    length = position - int(np.argmax(valid)) + 1
    if length < 2 or not ahead.any():
        return ""
    row = np.zeros(length)
    row[-1] = 1.0
    residual = float(values["residual"])
    for _ in range(len(values["layers"]) - int(values["start_layer"])):
        row = (
            residual * row
            + (1 - residual) * np.cumsum((row / np.arange(1, length + 1))[::-1])[::-1]
        )
    return (
        " Causal attention that is even over all tokens would give it "
        f"{percent(float(row[0]))} by depth alone."
    )


def _texts(record: AnalysisRecord, rows: list[tuple[int, int, np.ndarray]]) -> Section:
    fragments, pictures = [], []
    for sample, (position, _, weights) in enumerate(rows[:MOST_SAMPLES]):
        columns = _columns(record, sample)
        valid = record.arrays["source_valid"][sample].astype(bool)
        whole = record.values.get("sources") is None and len(valid) == len(columns)
        kept = np.flatnonzero(valid) if whole else np.arange(len(columns))
        shown = [columns[at] for at in kept]
        found = np.flatnonzero(kept == position)
        marked = int(found[0]) if len(found) and record.values.get("stack") != "joined" else None
        if tokens_of(record, sample) is None:
            shown = [f" {token}" for token in shown]
        title = f"Sample {sample}: what the token at position {position} owes to each token"
        head = f"<h3>{title}</h3>" if len(rows) > 1 else ""
        fragments.append(
            head + texts.text_html(shown, weights[kept], unit="share", marked=marked, most=12)
        )
        draw = partial(
            texts.text_figure,
            shown,
            weights[kept],
            unit="share owed",
            title=title,
            marked=marked,
        )
        caption = f"{title}: darker means more; framed is the token itself."
        pictures.append(Picture(f"text_{sample}", caption, draw, inline=False))
    said = [
        "Darker tokens are owed more; point at one for its number. The largest are in the table "
        "below the text."
    ]
    if len(rows) > MOST_SAMPLES:
        said.append(
            f"The first {MOST_SAMPLES} of {len(rows)} samples are drawn; the numbers of all are "
            "in the stored files."
        )
    return Section(
        "What the target owes to each token", said, fragments=fragments, pictures=pictures
    )


def _images(
    record: AnalysisRecord, grid: Mapping[str, int], rows: list[tuple[int, int, np.ndarray]]
) -> Section:
    fragments, pictures = [], []
    seen = record.arrays.get("images")
    for sample, (_, _, weights) in enumerate(rows[:MOST_SAMPLES]):
        patches = weights[grid["leading"] :].reshape(grid["rows"], grid["cols"])
        title = f"Image {sample}: share owed to each patch"
        if seen is None:
            draw = partial(
                heatmaps.single_map,
                patches,
                title=title,
                unit="share owed",
                power=1.0,
                axes_names=("row of patches", "column of patches"),
            )
        else:
            picture = seen[sample]
            fragments.append(f"<h3>{title}</h3>" + images.image_html(picture, patches))
            draw = partial(images.image_figure, picture, patches, unit="share owed", title=title)
        caption = f"{title}; bright patches are owed most. The scale is the image's own."
        pictures.append(Picture(f"image_{sample}", caption, draw, inline=seen is None))
    said = [
        f"Patches: {grid['rows']} × {grid['cols']}, after "
        f"{plural(grid['leading'], 'special token')}."
    ]
    return Section("What is owed to each patch", said, fragments=fragments, pictures=pictures)


def _matrix(record: AnalysisRecord) -> Section:
    matrix, factor = block_max(record.arrays["matrix"][0], SIDE)
    tokens = _columns(record, 0) if tokens_of(record) else None
    targets = record.values.get("targets")
    rows = None
    if tokens is not None and targets is not None and len(tokens) > max(targets[0]):
        rows = [tokens[at] for at in targets[0]]
    elif targets is None and matrix.shape[0] == matrix.shape[1]:
        rows = tokens
    draw = partial(
        heatmaps.single_map,
        matrix,
        queries=rows,
        keys=tokens,
        unit="share owed",
        pooled=factor,
        title="Rollout of the first sample",
        axes_names=("output", "input"),
    )
    caption = (
        "Each row is a token after the last layer; its shares over the input's tokens sum to 1."
    )
    return Section("All tokens", pictures=[Picture("matrix", caption, draw)])


def _first_token(
    record: AnalysisRecord, shares: np.ndarray, rows: list[tuple[int, int, np.ndarray]]
) -> Section:
    table = Table(
        "The first token's share of the row that is shown, and averaged over the valid rows.",
        ("sample", "target", "share of the first token", "mean over rows"),
        [
            (
                str(sample),
                str(row[0]) if row[0] >= 0 else "mean of all",
                percent(float(shares[sample, row[1]])),
                percent(_mean(shares[sample], _valid_rows(record)[sample])),
            )
            for sample, row in enumerate(rows)
        ],
    )
    said = (
        "Under a causal mask rollout drifts to the first token with depth, whatever the text "
        "says: each layer passes on what the "
        "layers before have gathered there. Hold the pictures against this share."
    )
    return Section("The first token's share", [said], [table])


def _mean(values: np.ndarray, valid: np.ndarray) -> float:
    return float(values[valid].mean()) if valid.any() else float("nan")


def _numbers(values: Mapping[str, Any]) -> list[Section]:
    sections = []
    attribution = values.get("attribution")
    if attribution:
        rows = [(name.replace("_", " "), number(value, 4)) for name, value in attribution.items()]
        said = (
            "Of the layer's attention and of the rollout, averaged over heads, samples and valid "
            "rows; entropies in nats. The mean attention is 1 over the number of visible keys by "
            "construction."
        )
        sections.append(
            Section(
                "In eight numbers",
                [said],
                [Table("compute_attention_attribution", ("name", "value"), rows)],
            )
        )
    checked = values.get("faithfulness")
    if checked and checked.get("effects"):
        sections.append(_deletions(checked))
    return sections


def _deletions(checked: Mapping[str, Any]) -> Section:
    effects = checked["effects"]
    rows = [
        (
            number(each["k"]),
            number(each["top_drop"]),
            f"{number(each['random_drop'])} ± {number(each['random_std'], 2)}",
            percent(float(each["better_than_random"])),
        )
        for each in effects
    ]
    table = Table(
        "Drop of the log-probability of the model's own prediction, in nats; ±: over random draws.",
        ("tokens deleted", "those owed most", "random ones", "the former hurt more"),
        rows,
    )
    said = (
        f"The tokens that the target owes most were taken away ({checked['way']}), and as many "
        "random "
        "ones: where the first hurts no more than the second, the attribution does not say what "
        "the "
        "model uses."
    )
    steps = [each["k"] for each in effects]
    draw = partial(
        lines.over_time,
        steps,
        {
            "those owed most": np.array([each["top_drop"] for each in effects], dtype=np.float64),
            "random ones": np.array([each["random_drop"] for each in effects], dtype=np.float64),
        },
        unit="drop of the log-probability, nats",
        title="What deleting tokens does to the model's own prediction",
        step_name="tokens deleted",
    )
    caption = "Deleting the tokens that are owed most should hurt more than deleting random ones."
    return Section("Is it faithful?", [said], [table], [Picture("deletions", caption, draw)])


def _faithfulness_findings(found: Mapping[str, Any] | None) -> list[Finding]:
    """A warning where deleting the top tokens hurts no more than deleting random ones, at any k."""
    effects = (found or {}).get("effects") or []
    better = [float(each["better_than_random"]) for each in effects]
    if not better or max(better) > 0.5:
        return []
    return [
        Finding(
            "warning",
            "not_faithful",
            "Deleting the tokens that are owed most hurts the model's prediction no more than "
            "deleting "
            f"random ones (it does in {percent(max(better))} of the draws at best): the "
            "attribution does "
            "not say what the model uses.",
        )
    ]
