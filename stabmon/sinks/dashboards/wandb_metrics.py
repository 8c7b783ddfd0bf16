"""Definitions of metrics in a W&B run: step, summary, and whether they get a panel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stabmon.sinks.dashboards.panels import LAYERS, STATE, extreme, telling

STEP = "stabmon/step"
_SUMMARIES = {"max": "max,last", "min": "min,last", "mean": "min,max,last"}
_STATES = {"learning_rate_factor": "min,last"}


class WandbMetrics:
    """Definitions of the metrics of one run, made as their names come up.

    Shown are ``stability/*`` of :data:`~stabmon.sinks.dashboards.panels.STATE` and the telling
    extreme of the first :data:`~stabmon.sinks.dashboards.panels.MOST_PANELS` signals; the others
    are hidden from automatic panels.

    Args:
        show_layers: show the curves of layers too.
    """

    def __init__(self, *, show_layers: bool) -> None:
        self._show_layers = show_layers
        self._known: set[str] = set()

    def begin(self, run: Any) -> None:
        """Define the step and the groups of names of a run."""
        self._known.clear()
        run.define_metric(STEP, hidden=True)
        for names in ("attention/*", "attention_heads/*", "attention_heatmap/*", "stability/*"):
            run.define_metric(names, step_metric=STEP)
        run.define_metric(f"{LAYERS}*", step_metric=STEP, hidden=not self._show_layers)

    def define(self, run: Any, names: Iterable[str]) -> None:
        """Define the metrics that are not defined yet.

        A definition by its full name goes before one by a group.
        """
        new = [name for name in names if name not in self._known]
        if not new:
            return
        self._known.update(new)
        signals = dict.fromkeys(n.split("/")[1] for n in new if n.startswith("attention/"))
        shown = {f"attention/{signal}/{extreme(signal)}" for signal in telling(signals)}
        for name in new:
            group, _, rest = name.partition("/")
            if group == "attention":
                how = rest.rpartition("/")[2]
                run.define_metric(
                    name,
                    step_metric=STEP,
                    hidden=name not in shown,
                    summary=_SUMMARIES.get(how, "last"),
                )
            elif group == "stability":
                run.define_metric(
                    name,
                    step_metric=STEP,
                    hidden=rest not in STATE,
                    summary=_STATES.get(rest, "max,last"),
                )

    def show(self, run: Any, names: Iterable[str]) -> None:
        """Give metrics of a hidden group panels of their own."""
        for name in names:
            run.define_metric(name, step_metric=STEP, summary="min,max,last", overwrite=True)
