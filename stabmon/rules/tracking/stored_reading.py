"""Readings as plain values, without the arrays that the history's tables hold."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from stabmon._storage.stored_value import Stored
from stabmon.records import LayerInfo, Reading

_ALWAYS_STORED = (
    *("learning_rate", "gradients", "query_key", "losses"),
    *("micro_batches", "non_finite", "overhead_fraction"),
)
"""Fields with defaults that every state has; without one of them it is damaged."""


def reading_state(reading: Reading) -> dict[str, Any]:
    """Return a reading without its arrays and layer facts, which are stored apart."""
    names = {layer: list(values) for layer, values in reading.layers.items()}
    return reading.to_dict() | {"layers": names, "info": list(reading.info)}


def stored_reading(
    saved: Stored,
    info: Mapping[str, LayerInfo],
    values: Mapping[str, Mapping[str, np.ndarray]],
    dropped: Container[str],
) -> Reading:
    """Return the reading that :func:`reading_state` wrote.

    Args:
        saved: its state.
        info: facts of each layer.
        values: ``values[layer][signal]``, ``[H]``, of this reading.
        dropped: signals to leave out.

    Raises:
        ValueError: if it is no reading's state, or names a layer or a signal without values.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for layer, names in saved["layers"].items():
        if layer not in values:
            raise ValueError(f"{names.where} is no layer of the history")
        kept = [name for name in map(Stored.text, names.parts()) if name not in dropped]
        if unknown := [name for name in kept if name not in values[layer]]:
            raise ValueError(f"{names.where} names the signal {unknown[0]!r}, which has no values")
        layers[layer] = {name: values[layer][name].copy() for name in kept}
    known = [layer.text() for layer in saved["info"].parts()]
    if unknown := [layer for layer in known if layer not in info]:
        raise ValueError(f"{saved.where}.info names {unknown[0]!r}, of which nothing is known")
    for name in _ALWAYS_STORED:
        saved[name]
    return Reading.from_dict(saved, layers=layers, info={layer: info[layer] for layer in known})


def step_and_loss(pair: Stored) -> tuple[int, float]:
    """Return a step and its loss from a list of two."""
    step, loss = pair.parts(2)
    return step.integer(), loss.number()
