"""Readings made by hand: signals of a small model over its steps, healthy or broken, with noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from stabmon.records import LayerInfo, NonFinite, Reading, StabilityIssue
from stabmon.rules import RULES, History, Rule
from stabmon.rules.tracking.issue_tracker import IssueTracker

HEADS = 4
LAYERS = ("blocks.0.attention", "blocks.1.attention")


def info(dtype: str = "float32", *, fused: bool = True, head_dim: int = 64) -> LayerInfo:
    return LayerInfo(heads=HEADS, head_dim=head_dim, scale=head_dim**-0.5, dtype=dtype, fused=fused)


def readings(
    signals: Mapping[str, np.ndarray],
    *,
    losses: np.ndarray | None = None,
    every: int = 10,
    first_step: int = 0,
    layer_info: LayerInfo | None = None,
    gradients: Sequence[Mapping[str, float]] | None = None,
) -> list[Reading]:
    """Signals ``[T, layers, HEADS]``, one loss a step (``[T * every]``) -> T readings, ``every``
    steps apart.
    """
    count = len(next(iter(signals.values())))
    out = []
    for t in range(count):
        step = first_step + (t + 1) * every
        since = (
            ()
            if losses is None
            else tuple((step - every + 1 + i, float(losses[t * every + i])) for i in range(every))
        )
        out.append(
            Reading(
                step=step,
                loss=since[-1][1] if since else None,
                layers={
                    name: {s: values[t, n] for s, values in signals.items()}
                    for n, name in enumerate(LAYERS)
                },
                info=dict.fromkeys(LAYERS, layer_info or info()),
                gradients={} if gradients is None else gradients[t],
                losses=since,
            )
        )
    return out


def shape(curve: np.ndarray, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A curve ``[T]`` for every head ``[T, layers, HEADS]``, times log-normal noise."""
    values = np.broadcast_to(
        np.asarray(curve, dtype=float)[:, None, None], (len(curve), len(LAYERS), HEADS)
    )
    return values * np.exp(noise * np.random.default_rng(seed).standard_normal(values.shape))


def falling_loss(
    steps: int,
    *,
    start: float = 5.5,
    end: float = 2.0,
    scale: float = 80.0,
    noise: float = 0.03,
    seed: int = 0,
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (
        end + (start - end) * np.exp(-np.arange(steps) / scale) + noise * rng.standard_normal(steps)
    )


def signals(
    score: np.ndarray, entropy: np.ndarray, saturated: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """A full set of consistent signals from score, normalised entropy and saturated share, each
    ``[T, layers, HEADS]``.
    """
    entropy = np.clip(entropy, 0.0, 1.0)
    if saturated is None:
        saturated = np.clip(1.0 - 4.0 * entropy, 0.0, 1.0)
    probability = np.clip(1.0 - 0.95 * entropy, 0.02, 1.0)
    return {
        "max_logit": score,
        "normalized_entropy": entropy,
        "attention_entropy": 4.0 * entropy,
        "saturated_fraction": saturated,
        "max_probability": probability,
        "collision_probability": probability**2,
        "sink_mass": np.full_like(score, 0.1),
        "softmax_jacobian_norm": np.full_like(score, 0.5),
        "hnf_log_curvature": np.log(np.maximum(score, 1e-3)),
        "hnf_log_curvature_bound": 2 * score,
        "precision_bits": np.log2(np.maximum(score, 1e-3) / 0.2),
    }


def tracker(rules: Iterable[Rule] | None = None, **options: object) -> IssueTracker:
    """A tracker of these rules (of all rules at their defaults) in which a failing rule fails the
    test.
    """

    def fail(error: Exception) -> None:
        raise error

    chosen = [RULES[name]() for name in RULES] if rules is None else list(rules)
    settings: dict[str, object] = {
        "history": History(),
        "cooldown_steps": 100,
        "on_error": fail,
        **options,
    }
    return IssueTracker(chosen, **settings)  # type: ignore[arg-type]


def run(
    watched: Iterable[Reading], rules: Iterable[Rule] | None = None, **options: object
) -> list[StabilityIssue]:
    """Everything that a tracker emits over these readings."""
    keeper = tracker(rules, **options)
    return [issue for reading in watched for issue in keeper.update(reading)]


def alarms(issues: Iterable[StabilityIssue]) -> list[StabilityIssue]:
    return [issue for issue in issues if issue.is_alarm and issue.state != "closed"]


def bad(step: int, kind: str = "activation", layer: str | None = LAYERS[0]) -> NonFinite:
    return NonFinite(step=step, kind=kind, layer=layer, head=None, tensor="output")  # type: ignore[arg-type]
