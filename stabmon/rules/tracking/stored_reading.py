"""Readings as plain values, without the arrays that the history's tables hold."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from stabmon._storage.stored_value import (
    Stored,
    stored_non_finite,
    stored_numbers,
    stored_overshoot,
)
from stabmon.records import LayerInfo, QKUpdate, Reading

_SCALARS = ("step", "loss", "learning_rate", "micro_batches", "overhead_fraction", "sampled")
_BY_GROUP = ("learning_rates", "rate_factors", "updates")
"""Fields that older states do not have."""


def reading_state(reading: Reading) -> dict[str, Any]:
    """Return a reading as plain values: of its layers only the names of the signals."""
    return {name: getattr(reading, name) for name in _SCALARS} | {
        **{name: dict(getattr(reading, name)) for name in ("gradients", *_BY_GROUP)},
        "layers": {layer: list(values) for layer, values in reading.layers.items()},
        "info": list(reading.info),
        "query_key": {layer: asdict(moved) for layer, moved in reading.query_key.items()},
        "losses": [list(pair) for pair in reading.losses],
        "non_finite": None if reading.non_finite is None else asdict(reading.non_finite),
        "overshoot": None if reading.overshoot is None else asdict(reading.overshoot),
    }


def stored_reading(
    saved: Stored,
    info: Mapping[str, LayerInfo],
    values: Mapping[str, Mapping[str, np.ndarray]],
    dropped: Container[str],
) -> Reading:
    """Return the reading that :func:`reading_state` wrote.

    Args:
        saved: its state.
        info: what is known of each layer.
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
    return Reading(
        step=saved["step"].integer(),
        loss=saved["loss"].maybe(Stored.number),
        layers=layers,
        info={layer: info[layer] for layer in known},
        learning_rate=saved["learning_rate"].maybe(Stored.number),
        gradients=stored_numbers(saved["gradients"]),
        query_key={layer: _stored_update(each) for layer, each in saved["query_key"].items()},
        losses=tuple(step_and_loss(pair) for pair in saved["losses"].parts()),
        micro_batches=saved["micro_batches"].integer(),
        non_finite=saved["non_finite"].maybe(stored_non_finite),
        overhead_fraction=saved["overhead_fraction"].maybe(Stored.number),
        overshoot=saved.get("overshoot", None).maybe(stored_overshoot),
        sampled=saved.get("sampled", True).flag(),
        **{name: stored_numbers(saved.get(name, {})) for name in _BY_GROUP},
    )


def stored_layer_info(saved: Stored) -> LayerInfo:
    """Return the layer's facts that ``asdict`` wrote."""
    return LayerInfo(
        heads=saved["heads"].integer(),
        head_dim=saved["head_dim"].integer(),
        scale=saved["scale"].number(),
        dtype=saved["dtype"].text(),
        fused=saved.get("fused", True).flag(),
        softcap=saved.get("softcap", None).maybe(Stored.number),
        adapted=saved.get("adapted", False).flag(),
    )


def step_and_loss(pair: Stored) -> tuple[int, float]:
    """Return a step and its loss from a list of two."""
    step, loss = pair.parts(2)
    return step.integer(), loss.number()


def _stored_update(saved: Stored) -> QKUpdate:
    return QKUpdate(*(saved[name].number() for name in ("gradient", "weight", "update")))
