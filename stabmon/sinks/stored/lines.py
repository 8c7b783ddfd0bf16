"""Facts of a stored reading without parsing its line whole."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import numpy as np

from stabmon._storage import strict_json
from stabmon.sinks.jsonl import SCHEMA_VERSION

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
    return LineFacts(int(marks[1]), int(marks[2]), int(head[2]), loss)


def head_of(line: bytes) -> tuple[int, float] | None:
    """Return step and loss from the first :data:`HEAD_BYTES` of a line; None where they lie deeper.

    None also for a loss that is not finite or unknown, which the end of the line tells apart.

    Example:
        >>> head_of(b'{"schema_version": 1, "step": 9, "loss": 2.5, "layers": {"h.0"')
        (9, 2.5)
    """
    head = _HEAD.match(line)
    if head is None or head[3] == b"null" or int(head[1]) != SCHEMA_VERSION:
        return None
    return int(head[2]), float(head[3])


def layer_signals(line: bytes, layer: str) -> dict[str, np.ndarray]:
    """Return the signals of one layer from a whole line, the others unparsed.

    Args:
        line: a line of ``readings.jsonl``.
        layer: the layer's name.

    Returns:
        signal -> ``[H]``, values that are not finite as NaN; empty where the layer is not there.

    Raises:
        ValueError: if what is there is no JSON.

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
        signal: np.array(heads, dtype=np.float64)
        for signal, heads in found.items()
        if isinstance(heads, list)
    }


def _parsed(line: bytes) -> LineFacts:
    values = strict_json.loads(line)
    try:
        _check_version(values["schema_version"])
        loss = values.get("loss")
        return LineFacts(
            int(values.get("run", 1)),
            int(values.get("start", 1)),
            int(values["step"]),
            None if loss is None else float(loss),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"no reading: {type(error).__name__} {error}") from error


def _check_version(version: int) -> None:
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {version!r}, this stabmon reads {SCHEMA_VERSION}")
