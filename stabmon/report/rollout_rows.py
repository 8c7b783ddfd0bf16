"""The rows of a rollout that its page shows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from stabmon.analysis.record import AnalysisRecord
from stabmon.report.words import tokens_of


class ShownRow(NamedTuple):
    """The row of one sample that is shown first."""

    position: int
    """Position of the target; -1 for the mean over patches."""
    place: int
    """Row of the matrix."""
    weights: np.ndarray
    """``[S]``, shares owed to each token of the input."""


def valid_rows(record: AnalysisRecord) -> np.ndarray:
    """Return the mask of rows that belong to tokens, ``[B, T]``."""
    valid = record.arrays["valid"].astype(bool)
    targets = record.values.get("targets")
    if targets is None:
        return valid[:, : record.arrays["matrix"].shape[1]]
    return np.take_along_axis(valid, np.asarray(targets), axis=1)


def shown_row(record: AnalysisRecord, sample: int) -> ShownRow:
    """Return the row of a sample that is shown first.

    It is the last target; of a text, the last valid row; of an image the class token, or without
    one the mean over the patches.

    Args:
        record: of kind ``rollout``.
        sample: number of the sample.

    Returns:
        The row.
    """
    matrix, values = record.arrays["matrix"][sample], record.values
    grid, targets = values.get("image_grid"), values.get("targets")
    if targets is not None:
        return ShownRow(int(targets[sample][-1]), matrix.shape[0] - 1, matrix[-1])
    if grid and grid["leading"]:
        return ShownRow(0, 0, matrix[0])
    if grid:
        return ShownRow(-1, 0, matrix.mean(0))
    valid = np.flatnonzero(record.arrays["valid"][sample])
    at = int(valid[-1]) if len(valid) else matrix.shape[0] - 1
    return ShownRow(at, at, matrix[at])


def column_names(record: AnalysisRecord, sample: int) -> list[str]:
    """Return the names of the matrix' columns: tokens, or positions."""
    width = record.arrays["matrix"].shape[2]
    sources = record.values.get("sources")
    tokens = tokens_of(record, sample)
    if sources is not None:
        places = [int(place) for place in sources[sample]]
        return [tokens[place] if tokens and place < len(tokens) else str(place) for place in places]
    return tokens if tokens and len(tokens) == width else [str(place) for place in range(width)]


def most_owed(
    record: AnalysisRecord, sample: int, weights: np.ndarray, most: int = 5
) -> list[dict[str, Any]]:
    """Return position, token and share of the largest weights.

    Args:
        record: of kind ``rollout``.
        sample: number of the sample.
        weights: ``[S]``, shares of one row.
        most: number of tokens.

    Returns:
        One mapping per token, the largest share first.
    """
    columns = column_names(record, sample)
    order = np.argsort(-np.nan_to_num(weights), kind="stable")[:most]
    return [
        {"position": int(at), "token": columns[at], "share": float(weights[at])} for at in order
    ]
