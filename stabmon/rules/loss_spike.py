"""Jump of the loss above its own recent course."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np

from stabmon._settings import Bounds, Count, NonNegative, Positive, renamed
from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule, rule
from stabmon.rules.evidence.moved_part import moved_part
from stabmon.rules.evidence.robust_stats import robust_spread
from stabmon.rules.symptoms import LOSS, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.code_lines import resume
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import known, number, with_limit


@rule
@renamed(
    stays_deviations="persistence_deviations",
    least_rise="min_rise",
    stays="persistence",
    far="extreme_rise",
    least_past="min_history",
)
@dataclass(frozen=True)
class LossSpike(Rule):
    """Jump of the loss above its own recent noise.

    An alarm once it stays up.

    Each loss since the last reading is compared with the median of the ``near`` losses before it,
    in units of their noise: the robust standard deviation of differences between neighbours over
    the square root of two, which a falling loss does not widen. A single high loss is a hard batch,
    and a loss that jumps and then steadily comes down is new data being learned: warnings.

    An alarm is a loss of which the newest ``persistence`` values are all well above and no longer
    come down, as after too large a step or where data has turned to noise; or of which all are so
    far above (``extreme_rise``) that no new data explains it; or any spike while steps are too
    large (``update_spike``), which no hard batch explains. Attributed to no head. Where the loss
    leapt within one step, and steps before it were no longer than others, ``evidence["cause"]`` is
    ``data``: weights do not move as far in one of their steps. Else a rate too high and broken
    attention look alike here.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> losses = [2.0 + 0.01 * (step % 3) for step in range(100)] + [5.0]
        >>> for step, loss in enumerate(losses, start=1):
        ...     history.add(Reading(step, loss, {}))
        >>> LossSpike().check(history)
        [StabilityIssue(warning loss_spike, run, step 101, value 5, threshold 2.211)]

    References:
        Chowdhery et al. 2022, arXiv:2204.02311, on loss spikes, and on going back and skipping
        batches.
    """

    symptom: ClassVar[Symptom] = LOSS
    quantity: ClassVar[str] = "loss"

    deviations: Positive = 8.0
    """Robust standard deviations above the recent median for a spike.

    Noise of heavy tails reaches 5.
    """
    persistence_deviations: NonNegative = 5.0
    """The same for each of the newest losses in an alarm.

    All of them that far is stranger than one at ``deviations``.
    """
    min_rise: NonNegative = 0.1
    """Least rise of the loss, as a share of the recent median.

    For runs whose loss hardly moves.
    """
    persistence: Annotated[int, Bounds(2)] = 24
    """Number of newest losses beyond the level for an alarm."""
    extreme_rise: NonNegative = 0.75
    """Rise of all newest losses for an alarm, as a share of the recent median.

    Though they come down.
    """
    recovering: Positive = 0.85
    """Largest ratio of an excess's newer half to its older half while it comes down.

    Then it is no alarm. The excess is the loss minus the recent median.
    """
    past: Count = 100
    """Number of losses from which the noise is taken."""
    near: Count = 32
    """Number of losses in the recent course: fewer, since it may be falling."""
    min_history: Count = 24
    """Number of losses needed before any is judged."""

    @classmethod
    def value_now(cls, issue: StabilityIssue, history: History) -> float | None:
        """Return the newest loss."""
        newest = history.recent_losses[-1:]
        return float(newest[0, 1]) if len(newest) else None

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the loss beside its recent median in words."""
        worst = issues[0]
        middle, at = known(worst.evidence, "recent_median"), worst.evidence.get("spike_step")
        numbers = with_limit("loss", worst)
        numbers += "" if middle is None else f", recent median {number(middle)}"
        numbers += "" if at is None else f", highest at step {at}"
        rank = worst.evidence.get("rank")
        numbers += "" if rank is None else f", on rank {rank} alone"
        leapt = worst.evidence.get("leapt_at")
        numbers += "" if leapt is None else f", by a leap at step {leapt}"
        part = worst.evidence.get("part_moved_most")
        numbers += f"; steps of {part} are longer than before" if part else ""
        stays = bool(worst.evidence.get("stays"))
        code = resume(framework, int(at)) if worst.is_alarm and at is not None else ""
        title = "loss jumped and stays up" if stays else "loss jumped"
        return Description(title, numbers, worst.suggestion, code)

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack({})

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return at most one issue, for the run; ``value`` is the highest new loss.

        On several ranks the losses are means over ranks, and the largest of a rank is judged in the
        same way: data that turned to noise on one rank of many hardly moves the mean. NaN and inf
        are left to ``non_finite``.
        """
        of_all = self._judge(history, history.recent_losses)
        if not history.rank_losses or any(issue.is_alarm for issue in of_all):
            return of_all
        table = np.array(history.rank_losses, dtype=np.float64)
        of_rank = self._judge(history, table[np.isfinite(table[:, 1]), :2])
        named = [replace(issue, evidence=_of_rank(issue, history)) for issue in of_rank]
        return named if any(issue.is_alarm for issue in named) else of_all or named

    def _judge(self, history: History, losses_so_far: np.ndarray) -> list[StabilityIssue]:
        """Judge ``[K, 2]`` (step, loss)."""
        reading = history.latest
        new = max(1, len(reading.losses))
        known = losses_so_far[-self.past - new - self.persistence :]
        steps, losses = known[:, 0], known[:, 1]
        # the past must end before any spike that may have begun within an earlier reading
        tail = new + self.persistence
        if len(losses) < self.min_history + tail:
            return []
        past, newest = losses[-self.past - tail : -tail], losses[-tail:]
        near = past[-self.near :]
        middle = float(np.median(near))
        spread = float(robust_spread(np.diff(past)[:, None])[0]) / 2**0.5
        level = middle + max(
            self.deviations * spread,
            self.min_rise * abs(middle),
            3 * spread + np.quantile(near, 0.95) - middle,
        )
        highest = int(np.argmax(newest[-new:])) + tail - new
        if newest[highest] <= level and not (
            history.is_open_at("loss_spike") and np.median(newest[-self.persistence :]) > level
        ):
            return []
        older, newer = np.split(newest[-2 * (self.persistence // 2) :] - middle, 2)
        coming_down = np.median(newer) < self.recovering * np.median(older)
        far = newest[-self.persistence :].min() > middle + self.extreme_rise * abs(middle)
        stays_level = middle + self.persistence_deviations / self.deviations * (level - middle)
        staying = bool(
            (newest[-self.persistence :] > stays_level).all() and (far or not coming_down)
        )
        too_long = newest[highest] > level and history.is_open_at("update_spike")
        is_alarm = staying or too_long
        moved = moved_part(history)
        first = len(losses) - tail + int(np.argmax(newest > min(level, newest[highest])))
        leapt = is_alarm and not too_long and not moved and _leapt(history, known, first, middle)
        evidence = {
            "spike_step": int(steps[-tail:][highest]),
            "recent_median": middle,
            "recent_spread": spread,
            "deviations": float((newest[highest] - middle) / max(spread, 1e-12)),
            "stays": staying,
            "update_spike": bool(too_long),
            **moved,
            **({"cause": "data", "leapt_at": int(steps[first])} if leapt else {}),
        }
        words = LEAPT.format(step=int(steps[first])) if leapt else STAYS
        return [
            StabilityIssue(
                step=reading.step,
                layer=None,
                head=None,
                issue_type="loss_spike",
                severity="error" if is_alarm else "warning",
                value=float(newest[highest]),
                threshold=float(level),
                suggestion=words if is_alarm else PASSING,
                evidence=evidence,
            )
        ]


def _leapt(history: History, known: np.ndarray, first: int, middle: float) -> bool:
    """Return whether the loss rose within one step, with no too long a step before it.

    Args:
        history: the readings so far.
        known: ``[K, 2]`` (step, loss) of the past and the newest.
        first: index of the first high loss.
        middle: the recent median before it.
    """
    (before, was), (step, now) = known[first - 1], known[first]
    lasting = float(np.median(known[first:, 1])) - middle
    found = history.overshoot
    too_long = found is not None and step - NEAR <= found.step
    return bool(step - before == 1 and now - was >= lasting / 2 > 0 and not too_long)


def _of_rank(issue: StabilityIssue, history: History) -> dict[str, Any]:
    """Return the evidence of an issue that one rank's loss makes, with that rank."""
    at = issue.evidence["spike_step"]
    rank = next(rank for step, _, rank in history.rank_losses if step == at)
    mean = next((loss for step, loss in history.losses if step == at), None)
    words = f"the loss of rank {rank} alone; the mean over ranks hardly moves"
    return {**issue.evidence, "rank": rank, "mean_over_ranks": mean, "detail": words}


NEAR = 24
"""Steps before a leap in which one that was too long may explain it."""
LEAPT = (
    "The loss leapt at step {step}, though steps before it were no longer than others: look at the "
    "batches and the labels from there on, and go back to a checkpoint before it once they are "
    "right."
)
"""Suggestion where the loss leapt within one step and stays up."""
STAYS = (
    "Go back to a checkpoint before the spike and skip the batches around it, then lower the rate "
    "or clip gradients; an attention issue that opened before it names the cause."
)
"""Suggestion where the loss stays up."""
PASSING = (
    "One hard batch passes by itself: check that batch; if spikes come back, clip "
    "gradients or lengthen the warm-up."
)
"""Suggestion where it may pass."""
