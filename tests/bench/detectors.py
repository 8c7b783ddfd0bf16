"""First alarm in a run: of stabmon, and of plainer rules and tools beside it."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stabmon.records import Reading
from stabmon.risk import RiskModel
from tests.bench.causes import blames_attention, cause_of
from tests.bench.references.zclip import spikes
from tests.bench.replay import Sampling, alarms
from tests.bench.watched_run import WatchedRun

EVERY = 5
"""Steps between readings of the detectors that stand beside stabmon and see attention."""


@dataclass(frozen=True)
class Alarm:
    """First alarm in a run."""

    step: int
    type: str
    where: str = "run"
    cause: str = ""
    """Cause that it names, empty for none; see :func:`tests.bench.causes.cause_of`."""
    of_attention: bool = False
    """Something of the same step says that attention is at fault."""
    layers: tuple[str, ...] = ()
    """Layers that alarms of the same step name."""


Detector = Callable[[WatchedRun, Sequence[Reading]], Alarm | None]


def stabmon_at(sampling: Sampling, model: RiskModel | None = None) -> Detector:
    """Make the shipped rules and risk a detector; ``model`` None for the shipped one."""

    def first(run: WatchedRun, readings: Sequence[Reading]) -> Alarm | None:
        issues = next(alarms(readings, sampling, model), None)
        if issues is None:
            return None
        return Alarm(
            issues[0].step,
            issues[0].issue_type,
            issues[0].where,
            cause_of(issues[0], run.groups),
            blames_attention(issues),
            tuple(sorted({each.layer for each in issues if each.layer is not None})),
        )

    return first


def score_above_100(run: WatchedRun, readings: Sequence[Reading]) -> Alarm | None:
    """Alarm on a largest score above 100, or not finite, in any head."""
    return _first_reading(readings, "logit_growth", lambda values: ~(values["max_logit"] <= 100))


def plain_rules(run: WatchedRun, readings: Sequence[Reading]) -> Alarm | None:
    """Alarm on low entropy, large scores or large probabilities in any head.

    Entropy below 0.5 nats, exp(2 x the largest score) above 1e6, or a largest probability above
    0.95.
    """

    def anomalous(values: dict[str, np.ndarray]) -> np.ndarray:
        wild = 2 * values["max_logit"] > math.log(1e6)
        sure = values["max_probability"] > 0.95
        found: np.ndarray = (values["attention_entropy"] < 0.5) | wild | sure
        return found

    return _first_reading(readings, "entropy_collapse", anomalous)


def _first_reading(
    readings: Sequence[Reading],
    name: str,
    anomalous: Callable[[dict[str, np.ndarray]], np.ndarray],
) -> Alarm | None:
    for reading in readings:
        if reading.step % EVERY:
            continue
        found = [layer for layer, values in reading.layers.items() if anomalous(dict(values)).any()]
        if found:
            return Alarm(reading.step, name, found[0], of_attention=True, layers=tuple(found))
    return None


def loss_spike(run: WatchedRun, readings: Sequence[Reading]) -> Alarm | None:
    """Alarm on a loss that is not finite, or four deviations above the mean of fifty before it."""
    losses = run.losses
    for at in range(20, len(losses)):
        past = losses[max(0, at - 50) : at]
        if not np.isfinite(losses[at]) or losses[at] > past.mean() + 4 * past.std():
            return Alarm(at + 1, "loss_spike")
    return None


def zclip(run: WatchedRun, readings: Sequence[Reading]) -> Alarm | None:
    """Alarm where ZClip would clip a gradient."""
    found = spikes([reading.gradients.get("", math.nan) for reading in readings])
    return Alarm(readings[found[0]].step, "gradient_explosion") if found else None


BESIDE: dict[str, Detector] = {
    "score > 100": score_above_100,
    "plain rules": plain_rules,
    "loss spike": loss_spike,
    "ZClip": zclip,
}
"""Detectors to hold stabmon against."""


def peers(python: Path, runs: Sequence[WatchedRun]) -> dict[str, Detector]:
    """Return trainspotter and trainpulse as detectors.

    Args:
        python: interpreter of a virtual environment with both.
        runs: the runs to judge, with which the tools are started once.
    """
    losses = {
        run.title: [float(loss) if np.isfinite(loss) else None for loss in run.losses]
        for run in runs
    }
    script = Path(__file__).parent / "references" / "loss_tools.py"
    said = subprocess.run(
        [str(python), str(script)],
        input=json.dumps(losses),
        capture_output=True,
        text=True,
        check=True,
    )
    return {tool: _told(first) for tool, first in json.loads(said.stdout).items()}


def _told(first: dict[str, int | None]) -> Detector:
    def detector(run: WatchedRun, readings: Sequence[Reading]) -> Alarm | None:
        at = first[run.title]
        return None if at is None else Alarm(at + 1, "loss")

    return detector
