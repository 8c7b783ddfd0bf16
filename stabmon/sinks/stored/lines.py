"""Facts of a stored reading without parsing its line whole."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from stabmon._storage import strict_json
from stabmon._storage.stored_value import Stored
from stabmon.sinks.jsonl import SCHEMA_VERSION

MOST_STARTS = 100_000
"""Runs, and starts of a run, in one folder; a larger number is damage."""
HEAD_BYTES = 512
"""Bytes at the start of a line that hold its step and loss."""
_HEAD = re.compile(rb'\{"schema_version": (\d+), "step": (\d+), "loss": (null|[-+.\deE]+), ')
_MARKS = re.compile(rb', "run": (\d+), "start": (\d+)[,}]')
_LAYERS = b'"layers": {'
_LOSS = re.compile(rb'"/loss": "(nan|inf|-inf)"')


class LineFacts(NamedTuple):
    """Run, start, step and loss of a stored reading."""

    run: int
    start: int
    step: int
    loss: float | None


def facts_of(line: bytes) -> LineFacts:
    """Return the facts of a whole line of ``readings.jsonl``.

    Its start and end are read where :class:`~stabmon.sinks.jsonl.JsonlSink` wrote it; any other
    order of fields is parsed.

    Raises:
        ValueError: if the line is no reading of this version.

    Example:
        >>> facts_of(b'{"schema_version": 1, "step": 9, "loss": 2.5, "run": 1, "start": 2}')
        LineFacts(run=1, start=2, step=9, loss=2.5)
    """
    head, at = _HEAD.match(line), line.rfind(b', "run": ')
    marks = _MARKS.match(line, at) if at >= 0 else None
    if head is None or marks is None or not line.rstrip().endswith(b"}"):
        return _parsed(line)
    _check_version(int(head[1]))
    loss = None if head[3] == b"null" else float(head[3])
    if loss is None and (found := _LOSS.search(line, at)) is not None:
        loss = float(found[1])
    run, start = marks_of({"run": int(marks[1]), "start": int(marks[2])})
    return LineFacts(run, start, Stored(int(head[2]), "step").integer(), loss)


def marks_of(values: dict[str, Any]) -> tuple[int, int]:
    """Take run and start out of a record; 1 where an early version wrote none.

    Raises:
        ValueError: if one is no whole number of at most 100,000.

    Example:
        >>> marks_of({"step": 9, "run": 1, "start": 2})
        (1, 2)
    """
    saved = Stored({name: values.pop(name, 1) for name in ("run", "start")})
    run, start = (saved[name].integer() for name in ("run", "start"))
    if max(run, start) > MOST_STARTS:
        raise ValueError(f"run {run} and start {start}: more than {MOST_STARTS:,} are none")
    return run, start


def audit_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an audit record, whose step, names and places are what views expect.

    Raises:
        ValueError: if one is of another type.

    Example:
        >>> audit_of({"step": "soon", "action": "applied"})
        Traceback (most recent call last):
        ValueError: step is 'soon', not a whole number
    """
    saved = Stored(values)
    if "step" in saved:
        saved["step"].integer()
    for name in ("intervention", "action"):
        if name in saved:
            saved[name].maybe(Stored.text)
    places = values.get("places")
    pairs = [each for each in places if len(each) == 2] if isinstance(places, list) else []
    for layer, head in (*pairs, (values.get("layer"), values.get("head"))):
        Stored(layer, "layer").maybe(Stored.text)
        Stored(head, "head").maybe(Stored.integer)
    return dict(saved.mapping())


def head_of(line: bytes) -> tuple[int, float] | None:
    """Return step and loss from the first :data:`HEAD_BYTES` of a line; None where they lie deeper.

    None also for a loss that is not finite or unknown, which the end of the line tells apart.

    Example:
        >>> head_of(b'{"schema_version": 1, "step": 9, "loss": 2.5, "layers": {"h.0"')
        (9, 2.5)
    """
    head = _HEAD.match(line)
    if head is None or head[3] == b"null":
        return None
    try:
        _check_version(int(head[1]))
        return Stored(int(head[2]), "step").integer(), float(head[3])
    except ValueError:  # a damaged line, which is parsed whole and left out then
        return None


def layer_signals(line: bytes, layer: str) -> dict[str, np.ndarray]:
    """Return the signals of one layer from a whole line, the others unparsed.

    Args:
        line: a line of ``readings.jsonl``.
        layer: the layer's name.

    Returns:
        signal -> ``[H]``, values that are not finite as NaN; empty where the layer is not there.

    Raises:
        ValueError: if what is there is no JSON, or no list of numbers.

    Example:
        >>> layer_signals(b'{"layers": {"a": {"max_logit": [1.5, null]}}}', "a")
        {'max_logit': array([1.5, nan])}
    """
    key = json.dumps(layer).encode() + b": {"
    layers = line.find(_LAYERS)
    at = line.find(key, layers + len(_LAYERS)) if layers >= 0 else -1
    if at < 0:
        return {}
    start = at + len(key) - 1
    found = json.loads(line[start : line.index(b"}", start) + 1])
    return {
        signal: Stored(heads, signal).array()
        for signal, heads in found.items()
        if isinstance(heads, list)
    }


def _parsed(line: bytes) -> LineFacts:
    values = strict_json.loads(line)
    try:
        _check_version(values["schema_version"])
        run, start = marks_of(values)
        saved = Stored(values)
        loss = saved.get("loss", None).maybe(Stored.number)
        return LineFacts(run, start, saved["step"].integer(), loss)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no reading: {type(error).__name__} {error}") from error


def _check_version(version: int) -> None:
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r}, this stabmon reads {SCHEMA_VERSION}")
