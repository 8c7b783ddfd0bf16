"""The table of a study, from the files of its tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from stabmon.study.plan import StudySettings
from stabmon.study.variants import BASE
from stabmon.tiny.statistics import mean_and_interval

HEADERS = (
    "variant",
    "held-out loss",
    "minus base, same seed",
    "trained or added parameters",
    "best step",
)
TITLES = {"frozen": "on a frozen base", "joint": "trained from scratch with the base"}


def results_of(folder: Path) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """Read the results by (kind, variant), then by seed."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for path in sorted((folder / "results").glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault((result["kind"], result["variant"]), {})[result["seed"]] = result
    return found


def summary(settings: StudySettings, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Summarise each kind of training, one row per variant.

    Args:
        settings: the study.
        folder: its results.

    Returns:
        Rows by kind: means over seeds with half of their 95 % intervals (None for one seed),
            differences taken within a seed.
    """
    results = results_of(folder)
    bases = results[("joint", BASE)]
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, names in (("frozen", settings.frozen), ("joint", settings.joint)):
        rows = [row_of(BASE, bases, bases, settings)]
        rows += [
            row_of(name, results[(kind, name)], bases, settings) for name in names if name != BASE
        ]
        found[kind] = rows if names or (kind == "joint" and not settings.frozen) else []
    return found


def row_of(
    name: str, results: Mapping[int, Any], bases: Mapping[int, Any], settings: StudySettings
) -> dict[str, Any]:
    """Summarise one variant.

    Args:
        name: the variant.
        results: its results by seed.
        bases: the base's results by seed.
        settings: the study.
    """
    losses = [results[seed]["held_out"] for seed in settings.seeds]
    gains = [results[seed]["held_out"] - bases[seed]["held_out"] for seed in settings.seeds]
    loss, loss_half = mean_and_interval(losses)
    gain, gain_half = mean_and_interval(gains)
    first = results[settings.seeds[0]]
    return {
        "variant": name,
        "held_out": loss,
        "held_out_half_interval": loss_half if len(losses) > 1 else None,
        "minus_base": gain,
        "minus_base_half_interval": gain_half if len(losses) > 1 else None,
        "parameters": first["added_parameters"] if name != BASE else first["parameters"],
        "best_steps": [results[seed]["best_step"] for seed in settings.seeds],
        "losses": losses,
    }


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Format a row."""
    difference = "" if row["variant"] == BASE else f"{row['minus_base']:+.4f}"
    difference += _interval(row["minus_base_half_interval"]) if difference else ""
    steps = ", ".join(map(str, row["best_steps"]))
    loss = f"{row['held_out']:.4f}{_interval(row['held_out_half_interval'])}"
    return (row["variant"], loss, difference, f"{row['parameters']:,}", steps)


def _interval(half: float | None) -> str:
    """Return the end of a value with an interval; empty for a single run, which has none."""
    return "" if half is None else f" ± {half:.4f}"


def _unit(seeds: int) -> str:
    if seeds == 1:
        return "one seed, nats a byte"
    return f"mean over {seeds} seeds ± half of its 95% interval, nats a byte"


def tables(found: Mapping[str, list[dict[str, Any]]], seeds: int) -> list[Table]:
    """Render the summary for the terminal.

    Args:
        found: from :func:`summary`.
        seeds: their number.
    """
    made = []
    for kind, rows in found.items():
        if rows:
            table = Table(title=f"{TITLES[kind]}: {_unit(seeds)}", title_justify="left")
            for place, header in enumerate(HEADERS):
                table.add_column(header, justify="right" if place else "left")
            for row in rows:
                table.add_row(*cells(row))
            made.append(table)
    return made


def markdown(found: Mapping[str, list[dict[str, Any]]], seeds: int) -> str:
    """Render the summary as Markdown.

    Args:
        found: from :func:`summary`.
        seeds: their number.
    """
    lines = []
    for kind, rows in found.items():
        if rows:
            lines += [
                f"## {TITLES[kind].capitalize()}",
                "",
                f"{_unit(seeds).capitalize()}.",
                "",
            ]
            lines += [
                f"| {' | '.join(HEADERS)} |",
                "|---|---:|---:|---:|---:|",
                *(f"| {' | '.join(cells(row))} |" for row in rows),
                "",
            ]
    return "\n".join(lines)
