"""Features of each layer's risk, from the readings so far."""

from __future__ import annotations

import warnings

import numpy as np

from stabmon.rules.evidence.robust_stats import median
from stabmon.rules.tracking.history import History

FEATURES = {
    "start": "entropy that attention lacked at the first reading and lacks now, over heads that are "
    "all alike, as untrained heads are and trained ones are not",
    "start_score": "ln of the largest score at the first reading, or now if lower, likewise",
    "sat10": "rise of the share of saturated rows over the last 10 steps",
    "sat40": "rise of the share of saturated rows over the last 40 steps",
    "heads10": "share of heads whose largest score doubled over the last 10 steps",
    "entropy_lost": "1 minus the normalised entropy, mean over heads",
    "gradient_missed": "-ln of the share of the model's gradient that W_q and W_k get, times the root "
    "of the number of layers; saturated rows pass none",
    "update_rel": "ln of the relative update of W_q and W_k over the median of parameter groups",
}
"""Features by name, in words. Each is a mean over a layer's heads, and grows with the risk."""
SCORE_FLOOR, SCORE_CEILING = 1.0, 1e6
"""Scores below and above these count as these."""
SCORES_ALIKE, ENTROPY_ALIKE = 0.5, 0.2
"""Standard deviations over heads, of ln max-score and of entropy, at which heads are not alike."""
USUAL = 5
"""Sampling interval in steps up to which a rise counts in full."""
NEWEST = 3
"""Readings whose median is the present update and gradient, and the past of a span."""


def layer_features(history: History) -> dict[str, np.ndarray]:
    r"""Return every feature of :data:`FEATURES` at the newest reading.

    Spans are optimizer steps: the past is the median of the readings up to the newest that lies at
    least that many steps back, or of the first.

    Args:
        history: at least one reading, with L attention layers.

    Returns:
        ``[L]`` by name, in the order of ``history.layers``; NaN where it is unknown.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> for step, entropy in ((10, 0.9), (20, 0.3)):
        ...     values = {"normalized_entropy": np.array([entropy, entropy])}
        ...     history.add(Reading(step, None, {"attn": values}))
        >>> layer_features(history)["entropy_lost"].round(2).tolist()
        [0.7]
    """
    score, entropy = _log_score(history.now("max_logit")), history.now("normalized_entropy")
    starts = [history.of_layer(layer).start for layer in history.layers]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing are NaN
        lost = 1 - _mean(entropy, starts)
        first_score = _log_score(_first(history, "max_logit"))
        first_entropy = _first(history, "normalized_entropy")
        alike = np.exp(
            -((np.nanstd(first_score) / SCORES_ALIKE) ** 2)
            - (np.nanstd(first_entropy) / ENTROPY_ALIKE) ** 2
        )
        past10, past40 = past_rows(history, 10), past_rows(history, 40)
        past_score = median(_log_score(history.rows("max_logit", past10)))
        doubled = score - past_score > np.log(2)
        return {
            "start": np.minimum(1 - _mean(first_entropy, starts), lost) * alike,
            "start_score": np.minimum(_mean(first_score, starts), _mean(score, starts)) * alike,
            "sat10": _rise(history, past10, 10, starts),
            "sat40": _rise(history, past40, 40, starts),
            "heads10": _mean(np.where(np.isfinite(score), doubled, np.nan), starts),
            "entropy_lost": lost,
            "gradient_missed": _gradient_missed(history),
            "update_rel": _relative_update(history),
        }


def past_rows(history: History, steps: int) -> slice:
    """Return the readings that are the past of a span of optimizer steps."""
    before = np.flatnonzero(history.steps[:-1] <= history.latest.step - steps)
    newest = int(before[-1]) if len(before) else 0
    return slice(max(0, newest - NEWEST + 1), newest + 1)


def _first(history: History, signal: str) -> np.ndarray:
    """Return ``[N]`` values of a signal at the first reading, or its baseline once that is gone."""
    if history.has_first:
        first: np.ndarray = history.rows(signal, slice(1))[0]
        return first
    return history.baseline(signal)


def _mean(values: np.ndarray, starts: list[int]) -> np.ndarray:
    """Return the mean over the finite heads of each layer, ``[..., N]`` to ``[..., L]``."""
    known = np.isfinite(values)
    total = np.add.reduceat(np.where(known, values, 0.0), starts, axis=-1)
    mean: np.ndarray = total / np.add.reduceat(known.astype(np.float64), starts, axis=-1)
    return mean


def _log_score(values: np.ndarray) -> np.ndarray:
    log: np.ndarray = np.log(np.clip(values, SCORE_FLOOR, SCORE_CEILING))
    return log


def _rise(history: History, past: slice, steps: int, starts: list[int]) -> np.ndarray:
    """Return the rise of each layer's share of saturated rows over some steps.

    The sparser the samples, the further back the past lies, and slow saturation would look sudden:
    the rise is scaled by the square root of the nominal over the true time.
    """
    now, before = history.now("saturated_fraction"), history.rows("saturated_fraction", past)
    rise: np.ndarray = _mean(now, starts) - median(_mean(before, starts))
    span = history.latest.step - float(np.median(history.steps[past]))
    return rise * min(1.0, (steps + USUAL) / span) ** 0.5 if span > 0 else rise


def _gradient_missed(history: History) -> np.ndarray:
    shares = np.full((NEWEST, len(history.layers)), np.nan)
    for row, reading in enumerate(history.readings[-NEWEST:]):
        whole = reading.gradients.get("", np.nan)
        for column, layer in enumerate(history.layers):
            moved = reading.query_key.get(layer)
            if moved is not None and whole > 0:
                shares[row, column] = moved.gradient / whole
    missed: np.ndarray = -np.log(np.maximum(median(shares) * len(history.layers) ** 0.5, 1e-6))
    return missed


def _relative_update(history: History) -> np.ndarray:
    own = np.full((NEWEST, len(history.layers)), np.nan)
    others = np.full(NEWEST, np.nan)
    for row, reading in enumerate(history.readings[-NEWEST:]):
        for column, layer in enumerate(history.layers):
            moved = reading.query_key.get(layer)
            own[row, column] = np.nan if moved is None else moved.relative_update
        known = [each for each in reading.updates.values() if np.isfinite(each)]
        others[row] = np.median(known) if known else np.nan
    relative: np.ndarray = median(np.log(np.maximum(own, 1e-7))) - median(
        np.log(np.maximum(others, 1e-7))
    )
    return relative
