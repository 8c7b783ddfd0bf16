"""Choice of the few metrics of a first screen, and of the layers worth curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from stabmon.records import SEVERITIES, StabilityIssue

LAYERS = "attention_layers/"
MARKER = "stability/intervention"
"""Scalar that is 1 at the step of an intervention, and 0 at later readings."""
STATE = ("risk", "issues_open", "learning_rate_factor", "intervention")
"""Metrics ``stability/<name>`` of a first screen."""
MOST_PANELS = 6
"""Panels of a section that W&B shows without a click."""
FEW_LAYERS = 4
"""Layers up to which each has curves, and the most that get them for their issues."""
LAYER_SIGNALS = ("risk", "max_logit", "normalized_entropy")
"""Curves of a layer that are shown; the others of that layer are logged."""
_TELLING = (
    "max_logit",
    "normalized_entropy",
    "hnf_log_curvature",
    "precision_bits",
    "saturated_fraction",
    "max_probability",
)
"""Signals by how much they say of an unstable run."""


def extreme(signal: str) -> str:
    """Return the extreme over all heads that shows trouble, ``"min"`` or ``"max"``.

    >>> extreme("normalized_entropy"), extreme("max_logit")
    ('min', 'max')
    """
    return "min" if "entropy" in signal else "max"


def telling(signals: Iterable[str]) -> list[str]:
    """Choose the signals of a first screen, at most :data:`MOST_PANELS`.

    >>> telling(["attention_entropy", "normalized_entropy", "max_logit"])
    ['max_logit', 'normalized_entropy', 'attention_entropy']
    """
    known = list(signals)
    first = [name for name in _TELLING if name in known]
    return [*first, *(name for name in known if name not in first)][:MOST_PANELS]


class LayerCurves:
    """Choice of the layers whose ``attention_layers/<layer>/<signal>`` are logged.

    All of a model of few layers; else those that issues name, up to :data:`FEW_LAYERS`.

    Args:
        every: all layers of any model.
    """

    def __init__(self, *, every: bool) -> None:
        self._every = every
        self._named: list[str] = []

    def note(self, issues: Sequence[StabilityIssue]) -> list[str]:
        """Choose the layers that issues name, the worst first; return those newly chosen."""
        worst = sorted(issues, key=lambda issue: -SEVERITIES.index(issue.severity))
        named = [
            issue.layer
            for issue in worst
            if issue.layer is not None and issue.state != "closed" and issue.severity != "info"
        ]
        room = FEW_LAYERS - len(self._named)
        new = [name for name in dict.fromkeys(named) if name not in self._named][:room]
        self._named += new
        return new

    def chosen(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Return the scalars without those of other layers."""
        layers = {name.rpartition("/")[0] for name in scalars if name.startswith(LAYERS)}
        if self._every or len(layers) <= FEW_LAYERS:
            return dict(scalars)
        left_out = layers - {LAYERS + layer for layer in self._named}
        return {
            name: value
            for name, value in scalars.items()
            if name.rpartition("/")[0] not in left_out
        }
