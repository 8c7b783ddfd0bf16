"""Stability region of a check before training, as tables that need no colour."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabmon.report.numbers import number

LETTERS = {"saturation": "S", "precision": "P", "curvature": "C", "overflow": "O"}


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    mark: str
    """``·`` where it is stable, else the letter of the limit that it crosses."""
    margin: str
    """Bits to the nearest limit, in words."""
    own: bool
    """True for the model itself."""

    @property
    def stable(self) -> bool:
        """True where no limit is crossed."""
        return self.mark == "·"


@dataclass(frozen=True)
class Grid:
    """Temperatures down, lengths or head dimensions across, in one number format."""

    title: str
    across: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class CheckSummary:
    """The stored check of a run."""

    subject: str
    verdict: str
    recommendations: tuple[str, ...]
    grids: tuple[Grid, ...]
    """The format that the model was checked for comes first."""


def check_summary(check: Mapping[str, Any] | None) -> CheckSummary | None:
    """Summarise a stored report of ``stabmon check --json``.

    Args:
        check: the report; None for none.

    Returns:
        Its verdict and region; None without a report, or for something else.
    """
    if not isinstance(check, Mapping) or "verdict" not in check:
        return None
    advice = check.get("recommendations")
    return CheckSummary(
        subject=str(check.get("subject", "")),
        verdict=str(check["verdict"]),
        recommendations=tuple(map(str, advice)) if isinstance(advice, list) else (),
        grids=tuple(_grids(check)),
    )


def _grids(check: Mapping[str, Any]) -> list[Grid]:
    region = check.get("region")
    if not isinstance(region, Mapping):
        return []
    try:
        names = list(region["columns"])
        points = [dict(zip(names, row, strict=True)) for row in region["rows"]]
        model = region["model"]
        formats = sorted({p["dtype"] for p in points}, key=lambda each: each != check.get("dtype"))
        return [
            _grid(points, model, dtype, across)
            for dtype in formats
            for across in ("seq_len", "head_dim")
        ]
    except (KeyError, TypeError, ValueError):
        return []


def _grid(
    points: Sequence[Mapping[str, Any]], model: Mapping[str, Any], dtype: str, across: str
) -> Grid:
    fixed = "head_dim" if across == "seq_len" else "seq_len"
    chosen = [p for p in points if p["dtype"] == dtype and p[fixed] == model[fixed]]
    places = sorted({p[across] for p in chosen})
    at = {(p["temperature"], p[across]): p for p in chosen}
    rows = tuple(
        (
            f"{heat:g}" if heat >= 1 else f"1/{1 / heat:g}",
            tuple(_cell(at[heat, place], model, across) for place in places),
        )
        for heat in sorted({p["temperature"] for p in chosen}, reverse=True)
    )
    name = {"seq_len": "lengths", "head_dim": "head dimensions"}
    other = {"head_dim": "head dimension", "seq_len": "length"}[fixed]
    title = f"{dtype}: temperatures down, {name[across]} across, at {other} {number(model[fixed])}"
    return Grid(title, tuple(_short(int(place)) for place in places), rows)


def _cell(point: Mapping[str, Any], model: Mapping[str, Any], across: str) -> Cell:
    margin = point["margin"]
    words = "no limit" if margin is None or math.isinf(margin) else f"{margin:.1f} bits"
    mark = "·" if point["stable"] else LETTERS.get(str(point["cause"]), "✕")
    own = point["temperature"] == 1.0 and point[across] == model[across]
    return Cell(mark, words, own)


def _short(value: int) -> str:
    return f"{value // 1024}k" if value >= 1024 and value % 1024 == 0 else str(value)
