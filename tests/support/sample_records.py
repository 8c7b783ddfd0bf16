"""Records to write in tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stabmon.records import LayerInfo, NonFinite, Reading, StabilityIssue

LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")
META = {"versions": {"stabmon": "0.1.0"}, "config": {"log_every": 10}}


def reading(step: int, heads: int = 4, **changes: object) -> Reading:
    """A reading of two layers whose values name their place: layer + head / 10 + step / 1000."""
    place = [layer + np.arange(heads) / 10 + step / 1000 for layer in range(len(LAYERS))]
    values: dict[str, object] = {
        "step": step,
        "loss": 4.0 - step / 1000,
        "layers": {
            name: {"attention_entropy": place[i], "max_logit": 10 * place[i]}
            for i, name in enumerate(LAYERS)
        },
        "info": {
            name: LayerInfo(heads=heads, head_dim=8, scale=8**-0.5, dtype="bfloat16")
            for name in LAYERS
        },
        "learning_rate": 3e-4,
        "gradients": {"": 1.25, LAYERS[0]: 0.5},
        "losses": ((step - 1, 4.5), (step, 4.0 - step / 1000)),
        "micro_batches": 2,
        "overhead_fraction": 0.0125,
    }
    return Reading(**(values | changes))  # type: ignore[arg-type]


def non_finite(step: int) -> NonFinite:
    """A NaN in a weight."""
    return NonFinite(step, "parameter", LAYERS[1], None, "q_proj.weight", "1 of 64 values is NaN")


def issue(step: int, head: int | None = 2, **changes: object) -> StabilityIssue:
    """An entropy collapse in the second layer, of severity error."""
    values: dict[str, object] = {
        "step": step,
        "layer": LAYERS[1],
        "head": head,
        "issue_type": "entropy_collapse",
        "severity": "error",
        "value": 0.034,
        "threshold": 0.1,
        "suggestion": "lower the learning rate [1e-4] or add QK-norm",
        "evidence": {"baseline": 0.8, "history": [0.8, 0.4, 0.034]},
    }
    return StabilityIssue(**(values | changes))  # type: ignore[arg-type]


def same(left: Reading, right: Reading) -> bool:
    """Whether two readings hold the same values, NaN being equal to NaN; the layers' arrays bit for
    bit.
    """
    plain = ("step", "learning_rate", "micro_batches", "overhead_fraction", "non_finite", "info")
    return (
        all(getattr(left, name) == getattr(right, name) for name in plain)
        and repr(left.loss) == repr(right.loss)
        and np.array_equal(np.array(left.losses), np.array(right.losses), equal_nan=True)
        and left.gradients.keys() == right.gradients.keys()
        and np.array_equal(
            list(left.gradients.values()), list(right.gradients.values()), equal_nan=True
        )
        and left.layers.keys() == right.layers.keys()
        and all(left.layers[layer].keys() == right.layers[layer].keys() for layer in left.layers)
        and all(
            np.array_equal(values, right.layers[layer][signal], equal_nan=True)
            for layer, signals in left.layers.items()
            for signal, values in signals.items()
        )
    )


def stored(record: Reading) -> Reading:
    """A reading as its line has it: numbers of 8 significant digits."""

    def rounded(value: float) -> float:
        return float(f"{value:.8g}")

    return replace(
        record,
        loss=None if record.loss is None else rounded(record.loss),
        losses=tuple((step, rounded(loss)) for step, loss in record.losses),
        gradients={name: rounded(norm) for name, norm in record.gradients.items()},
        info={
            layer: replace(each, scale=rounded(each.scale)) for layer, each in record.info.items()
        },
        layers={
            layer: {name: np.array([rounded(x) for x in heads]) for name, heads in signals.items()}
            for layer, signals in record.layers.items()
        },
    )
