"""Lower the learning rate of a model that its steps change too much of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stabmon.interventions.effects.effect import HeldEffect
from stabmon.interventions.run.training_run import TrainingRun

TOO_MUCH = 2.0
"""Times the share that fits at which steps are too long.

With W_q and W_k left out, steps of healthy small models changed 0.01 of their other weights at the
peak of the rate, and at three times the usual rate 0.015; rates that ended 0.3 nats behind also
with their scores held changed 0.025 and more.
"""


class FittingRate(HeldEffect):
    """Ceilings on the rates of all parameter groups, found from what steps change.

    At each sampled step the share of its weights that the step changed is read, the median over
    the parameter groups by their size; those of W_q and W_k are left out where there are others.
    Where it is more than ``TOO_MUCH`` times ``share``, the rates used are lowered in proportion, and
    held as ceilings: under any scheduler, also one that sets rates at each step, a scheduled rate
    below is used as it is.

    Args:
        run: the run.
        share: the share that fits.
        caps: ceilings by group, where they are held again after a restart.

    Raises:
        NotApplicable: if no optimizer of the run takes hooks.
    """

    def __init__(
        self, run: TrainingRun, share: float, caps: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.run, self.share = run, share
        self.caps = dict(caps or {})
        self._rates = run.rates
        self._read: int | None = None
        self._release: Callable[[], None] = lambda: None
        if self.caps:
            self._hold()
        self._remove = [run.step_hooks.add("on_step", self._on_step)]
        self._on_step()

    def release(self) -> None:
        super().release()
        self._release()

    def was_active(self) -> bool:
        scheduled = {group.key: self.run.scheduled_rate(group) for group in self.run.groups}
        return any((scheduled.get(key) or 0.0) > cap for key, cap in self.caps.items())

    def state_dict(self) -> dict[str, Any]:
        return dict(self.caps)

    def _on_step(self) -> None:
        """Lower the ceilings where a step that was read since changed too much."""
        if not len(self.run.history) or self.run.history.latest.step == self._read:
            return
        reading = self.run.history.latest
        self._read = reading.step
        sizes = {
            group.key: sum(each.numel() for each in group.parameters) for group in self.run.groups
        }
        known = {key: share for key, share in reading.updates.items() if math.isfinite(share)}
        others = {k: v for k, v in known.items() if k not in reading.query_key_groups} or known
        moved = torch.tensor([_median(others, sizes)])
        share = float(self.run.largest_over_ranks(moved))  # of shards each rank knows its own
        if not TOO_MUCH * self.share < share < math.inf:
            return
        lower = {
            key: min(rate * self.share / share, self.caps.get(key, math.inf))
            for key, rate in reading.used_rates.items()
        }
        self.run.audit(
            {
                "intervention": "qk_clip",
                "action": "again",
                "step": self.run.step,
                "layer": None,
                "head": None,
                "before": {"learning_rate": max(reading.used_rates.values(), default=0.0)},
                "after": {"learning_rate": max(lower.values(), default=0.0), "caps": lower},
                "why": f"a step changed {share:.1%} of the model: its rate is too high for all "
                "parameters",
            }
        )
        self.caps |= lower
        self._hold()

    def _hold(self) -> None:
        self._release()
        self._release = self._rates.cap(dict(self.caps))


def _median(shares: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """Return the median of shares by the sizes of their groups; 0 where there is none."""
    ordered = sorted((share, sizes.get(key, 0)) for key, share in shares.items())
    half, so_far = sum(size for _, size in ordered) / 2, 0
    for share, size in ordered:
        so_far += size
        if so_far >= half:
            return share
    return 0.0
