"""Alarms by stabmon's rules and by plainer ones, from kept readings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from stabmon.config import load_config
from stabmon.records import Reading
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import IssueTracker
from tests.bench.testbed.cases import Case
from tests.bench.testbed.models import attention_modules, build


@dataclass(frozen=True)
class Alarm:
    """An issue of severity error or above."""

    step: int
    type: str
    layer: int | None = None
    """Number of the attention layer; None for the run or anything else."""
    head: int | None = None
    where: str = ""


def thinned(readings: list[Reading], every: int) -> Iterator[Reading]:
    """Yield the readings of a monitor that samples one step in ``every``.

    ``every`` is a multiple of the interval of ``readings``.
    """
    losses: list[tuple[int, float]] = []
    for reading in readings:
        losses += reading.losses
        if reading.step % every == 0:
            yield replace(reading, losses=tuple(losses))
            losses = []


def alarms_of(case: Case, every: int) -> list[Alarm]:
    """Return every alarm of stabmon's rules, in order."""
    config = load_config("observe", log_every=every, schedule="fixed")
    tracker = IssueTracker(
        config.make_rules(),
        history=History(config.history),
        clear_after=config.clear_after,
        cooldown_steps=config.cooldown * every,
    )
    names = [name for name, _ in attention_modules(build(case.recipe.shape)[0])]
    found = []
    for reading in thinned(case.run.readings, every):
        for issue in tracker.update(reading):
            if issue.is_alarm:
                layer = names.index(issue.layer) if issue.layer in names else None
                found.append(Alarm(issue.step, issue.issue_type, layer, issue.head, issue.where))
    return found


def _first(
    case: Case, every: int, alarmed: Callable[[Reading, str], np.ndarray], name: str
) -> list[Alarm]:
    """Return an alarm at the first reading with an alarmed head, once per reading."""
    found = []
    for reading in thinned(case.run.readings, every):
        for at, layer in enumerate(reading.layers):
            heads = np.flatnonzero(alarmed(reading, layer))
            if len(heads):
                found.append(Alarm(reading.step, name, at, int(heads[0])))
                break
    return found


def plain_rules(case: Case, every: int) -> list[Alarm]:
    """Alarm on low entropy, large scores or large probabilities in any head.

    Entropy below 0.5 nats, exp(2 x the largest score) above 1e6, or a largest probability above
    0.95.
    """

    def alarmed(reading: Reading, layer: str) -> np.ndarray:
        values = reading.layers[layer]
        wild = 2 * values["max_logit"] > math.log(1e6)
        found: np.ndarray = (
            (values["attention_entropy"] < 0.5) | wild | (values["max_probability"] > 0.95)
        )
        return found

    return _first(case, every, alarmed, "entropy_collapse")


def score_above_100(case: Case, every: int) -> list[Alarm]:
    """Alarm on a largest score above 100 in any head."""
    return _first(
        case, every, lambda reading, layer: reading.layers[layer]["max_logit"] > 100, "logit_growth"
    )


def loss_spikes(case: Case, every: int) -> list[Alarm]:
    """Alarm on a loss spike.

    A loss that is not finite, or four standard deviations above the mean of the fifty before it.
    """
    losses, found = case.run.losses, []
    for at in range(20, len(losses)):
        past = losses[max(0, at - 50) : at]
        if not np.isfinite(losses[at]) or losses[at] > past.mean() + 4 * past.std():
            found.append(Alarm(at + 1, "loss_spike"))
    return found


BASELINES = {"plain rules": plain_rules, "score > 100": score_above_100, "loss spike": loss_spikes}
