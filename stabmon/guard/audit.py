"""Write audit records of interventions that were not made."""

from __future__ import annotations

from typing import Any

from stabmon.interventions.run.training_run import TrainingRun


def write_not_made(
    run: TrainingRun,
    action: str,
    name: str | None,
    layer: str | None,
    head: int | None,
    **more: Any,
) -> None:
    """Write a record of something that was not done.

    Args:
        run: the run, with the audit that takes the record.
        action: ``refused`` or ``gave_up``.
        name: the intervention's name; None where it is about none.
        layer: qualified name; None for the run, or several.
        head: query head; None for the layer, or several.
        **more: further entries.

    Example:
        >>> run = TrainingRun(None, step=3, audit=print)
        >>> write_not_made(run, "refused", "stop", None, None)
        {'intervention': 'stop', 'action': 'refused', 'step': 3, 'layer': None, 'head': None}
    """
    record = {"intervention": name, "action": action, "step": run.step}
    run.audit({**record, "layer": layer, "head": head, **more})
