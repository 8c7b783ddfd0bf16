"""Stored records as tables of pandas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from stabmon.incidents import Incident
from stabmon.records import Reading, StabilityIssue, head_count

Run = tuple[int, Any]
"""Number of a run, and its records."""


def frame_of(what: str, runs: Sequence[Run]) -> Any:
    """Return one table over all runs; see :meth:`stabmon.sinks.reader.Records.to_pandas`.

    Args:
        what: ``readings``, ``issues``, ``interventions`` or ``incidents``.
        runs: number and records of each run.

    Raises:
        ValueError: for another ``what``.
        ImportError: if pandas is not installed.
    """
    if what not in FRAMES:
        raise ValueError(f"to_pandas({what!r}): use one of {', '.join(map(repr, FRAMES))}")
    try:
        import pandas
    except ImportError as error:
        raise ImportError('pandas is not installed: pip install "stabmon[pandas]"') from error
    return FRAMES[what](pandas, runs)


def _readings(pandas: Any, runs: Sequence[Run]) -> Any:
    """Return one row per head of each reading; one without a head for a reading without layers."""
    found = [(number, reading) for number, run in runs for reading in run.readings]
    parts = [
        (number, reading, name) for number, reading in found for name in reading.layers or ("",)
    ]
    counts = [_heads(reading, layer) for _, reading, layer in parts]
    rows = sum(counts)

    def repeated(values: Iterable[Any], kind: Any) -> np.ndarray:
        return np.repeat(np.array(list(values), dtype=kind), counts)

    layers = list(dict.fromkeys(name for _, reading in found for name in reading.layers))
    code = {name: place for place, name in enumerate(layers)} | {"": -1}
    head = np.concatenate([np.arange(count) for count in counts] or [np.arange(0)])
    known = repeated((layer != "" for _, _, layer in parts), bool)
    columns: dict[str, Any] = {
        "run": repeated((number for number, _, _ in parts), np.int64),
        "step": repeated((reading.step for _, reading, _ in parts), np.int64),
        "loss": repeated((_number(reading.loss) for _, reading, _ in parts), float),
        "learning_rate": repeated((_number(r.learning_rate) for _, r, _ in parts), float),
        "layer": pandas.Categorical.from_codes(
            repeated((code[layer] for _, _, layer in parts), np.int64), layers
        ),
        "head": pandas.array(np.where(known, head, 0), dtype="Int64"),
    }
    columns["head"][~known] = pandas.NA
    signals = dict.fromkeys(
        signal for _, reading in found for values in reading.layers.values() for signal in values
    )
    for signal in signals:
        values = np.full(rows, np.nan)
        at = 0
        for (_, reading, layer), count in zip(parts, counts, strict=True):
            heads = reading.layers.get(layer, {}).get(signal, ())
            values[at : at + np.size(heads)] = heads
            at += count
        columns[signal] = values
    return pandas.DataFrame(columns)


def _heads(reading: Reading, layer: str) -> int:
    return max(1, head_count(reading.layers.get(layer, {})))


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _records(
    kind: type[StabilityIssue] | type[Incident], name: str
) -> Callable[[Any, Sequence[Run]], Any]:
    """Return a function that makes a table with one column per field of a record."""
    columns = ["run", *(each.name for each in fields(kind))]

    def frame(pandas: Any, runs: Sequence[Run]) -> Any:
        rows = [
            (number, *(getattr(each, column) for column in columns[1:]))
            for number, run in runs
            for each in getattr(run, name)
        ]
        made = pandas.DataFrame(rows, columns=columns)
        return made.astype({"head": "Int64"}) if "head" in columns else made

    return frame


def _interventions(pandas: Any, runs: Sequence[Run]) -> Any:
    rows: list[Mapping[str, Any]] = [
        {"run": number, **record} for number, run in runs for record in run.interventions
    ]
    return pandas.DataFrame(
        rows, columns=None if rows else ["run", "step", "intervention", "action"]
    )


FRAMES: dict[str, Callable[[Any, Sequence[Run]], Any]] = {
    "readings": _readings,
    "issues": _records(StabilityIssue, "issues"),
    "interventions": _interventions,
    "incidents": _records(Incident, "incidents"),
}
