"""Dashboard scalars of a sampled step, under fixed names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stabmon.records import Reading, StabilityIssue


def dashboard_scalars(
    reading: Reading, open_issues: Sequence[StabilityIssue], *, alarms: int
) -> dict[str, float]:
    """Return the dashboard's scalars of one sampled step.

    - ``attention/<signal>/max``, ``/mean`` and ``/min`` over every head of the model;
    - ``attention_layers/<layer>/<signal>``: over the heads of a layer, the largest value of a
      signal that is itself a maximum (``max_logit``, the curvatures …), else the mean, so that one
      anomalous head is not averaged away where it counts;
    - ``stability/risk`` and ``attention_layers/<layer>/risk``: the chance, in [0, 1], that attention
      damages the run from here on;
    - ``stability/issues_open``, ``stability/alarms`` and, once it is known,
      ``stability/overhead_fraction``.

    Every value is finite: dashboards drop NaN, draw it as zero or refuse the whole batch. Heads at
    NaN or ±inf are left out, and so is a scalar that has no finite head behind it; such heads show
    up as an issue, and exactly in the records.

    Args:
        reading: the measurements, ``layers[layer][signal]`` being ``[H]``.
        open_issues: the issues open after this step.
        alarms: number of issues of severity error or above in the run so far.

    Returns:
        A finite number by name.

    Example:
        >>> reading = Reading(10, 2.5, {"h.0": {"max_logit": np.array([3.0, 5.0])}})
        >>> dashboard_scalars(reading, [], alarms=0)["attention/max_logit/mean"]
        4.0
    """
    scalars: dict[str, float] = {}
    for signal, values in _by_signal(reading.layers).items():
        if values.size:
            scalars[f"attention/{signal}/max"] = float(values.max())
            scalars[f"attention/{signal}/mean"] = float(values.mean())
            scalars[f"attention/{signal}/min"] = float(values.min())
    for layer, signals in reading.layers.items():
        for signal, heads in signals.items():
            values = _finite(heads)
            if values.size:
                reduced = values.max() if reduction(signal) == "max" else values.mean()
                scalars[f"attention_layers/{layer}/{signal}"] = float(reduced)
        if layer in reading.risk:
            scalars[f"attention_layers/{layer}/risk"] = reading.risk[layer]
    if reading.risk:
        scalars["stability/risk"] = max(reading.risk.values())
    scalars["stability/issues_open"] = float(len(open_issues))
    scalars["stability/alarms"] = float(alarms)
    if reading.overhead_fraction is not None and np.isfinite(reading.overhead_fraction):
        scalars["stability/overhead_fraction"] = float(reading.overhead_fraction)
    return scalars


def reduction(signal: str) -> str:
    """Return a signal's reduction over rows and heads, ``"max"`` or ``"mean"``.

    ``"mean"`` for a signal that is not registered.
    """
    from stabmon.signals import SIGNALS

    return SIGNALS[signal].reduction if signal in SIGNALS else "mean"


def _by_signal(layers: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return each signal's finite values over all heads of all layers, ``[N]``."""
    gathered: dict[str, list[np.ndarray]] = {}
    for signals in layers.values():
        for signal, heads in signals.items():
            gathered.setdefault(signal, []).append(_finite(heads))
    return {signal: np.concatenate(parts) for signal, parts in gathered.items()}


def _finite(heads: np.ndarray) -> np.ndarray:
    """Return the finite ones of ``[H]`` values."""
    values = np.asarray(heads, dtype=np.float64).reshape(-1)
    return values[np.isfinite(values)]
