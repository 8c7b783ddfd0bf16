"""The page of a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.figures import texts
from stabmon.figures.labels import plain_token
from stabmon.figures.pooling import block_max
from stabmon.report.maps import packed_maps
from stabmon.report.numbers import percent, plural
from stabmon.report.page import Finding, Page
from stabmon.report.rollout_rows import ShownRow, column_names, most_owed, shown_row, valid_rows
from stabmon.report.rollout_sections import (
    SIDE,
    first_token_section,
    image_section,
    matrix_section,
    number_sections,
    text_section,
)
from stabmon.report.words import common_facts, non_finite, tokens_of

MISLEADS = 0.5
"""Mean share of the first token from which a rollout is misleading."""


def rollout_page(record: AnalysisRecord) -> Page:
    """Draw up the page of a ``rollout`` record.

    Args:
        record: of :meth:`stabmon.analysis.rollout.result.Rollout.to_record`, with the command's
            ``tokens`` and, of vision models, the array ``images`` ``[B, height, width, 3]``.

    Returns:
        The page.
    """
    values, matrix = record.values, record.arrays["matrix"]
    shares = np.asarray(values["first_token_share"], dtype=np.float64)
    rows = [shown_row(record, sample) for sample in range(len(matrix))]
    grid = values.get("image_grid")
    sections = [image_section(record, grid, rows) if grid else text_section(record, rows)]
    if matrix.shape[1] > 1:
        sections.append(matrix_section(record))
    sections.append(first_token_section(record, shares, rows))
    sections += number_sections(values)
    findings = non_finite({"the rollout": matrix[valid_rows(record)]})
    own = float(np.nanmean([shares[sample, row.place] for sample, row in enumerate(rows)]))
    if not grid and own >= MISLEADS:
        findings.append(
            Finding(
                "warning",
                "first_token",
                f"{percent(own)} of what the target owes is owed to the first token. Rollout "
                "drifts there with depth whatever the text says, so that this picture says little "
                "about the other tokens: use --weighting gradient, fewer layers (--layers), or "
                "look at single layers (--kind heatmap).",
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
                {"target": row.position, "owed_most": most_owed(record, sample, row.weights)}
                for sample, row in enumerate(rows)
            ],
        },
    )


def terminal_overlay(record: AnalysisRecord, most: int = 600) -> Any:
    """Write the first sample's tokens with their shares for a terminal.

    Args:
        record: as :func:`rollout_page` takes it.
        most: largest number of tokens to write.

    Returns:
        A ``rich.text.Text``; None for images and longer texts.
    """
    columns = tokens_of(record)
    position, _, weights = shown_row(record, 0)
    if columns is None or len(columns) != len(weights) or len(columns) > most:
        return None
    return texts.text_terminal(columns, weights, marked=position if position >= 0 else None)


def _verdict(
    record: AnalysisRecord,
    rows: list[ShownRow],
    shares: np.ndarray,
    grid: Mapping[str, int] | None,
) -> list[str]:
    values = record.values
    names = values["layers"]
    said = [
        f"How much each token after {plural(len(names), 'layer')} owes to each token of the "
        f"input: {values['method']}. Shares of a row sum to 1."
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
            f"row {best // grid['cols']}, column {best % grid['cols']} "
            f"({percent(float(patches[best]))}; evenly it would be "
            f"{percent(share / len(patches))})."
        )
        return said
    columns = column_names(record, 0)
    parts = [
        f"“{plain_token(each['token'], 30)}” at {each['position']} ({percent(each['share'])})"
        for each in most_owed(record, 0, weights, 4)
    ]
    own = columns[position] if position < len(columns) and values.get("stack") != "joined" else ""
    named = f" (“{plain_token(own, 30)}”)" if own and own != str(position) else ""
    said.append(
        f"In the first sample the token at position {position}{named} owes most to "
        f"{', '.join(parts)}."
    )
    first = np.array([shares[sample, row.place] for sample, row in enumerate(rows)])
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


def _faithfulness_findings(found: Mapping[str, Any] | None) -> list[Finding]:
    """Warn if deleting the top tokens hurts no more than deleting random ones at all k."""
    effects = (found or {}).get("effects") or []
    better = [float(each["better_than_random"]) for each in effects]
    if not better or max(better) > 0.5:
        return []
    return [
        Finding(
            "warning",
            "not_faithful",
            "Deleting the tokens that are owed most hurts the model's prediction no more than "
            f"deleting random ones (it does in {percent(max(better))} of the draws at best): the "
            "attribution does not say what the model uses.",
        )
    ]
