"""Assemble the reading of a step from everything measured in it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from stabmon._torch.optimizer_adapter import OptimizerAdapter
from stabmon._torch.process_group import rank
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.engine.rank_reducer import RankReducer
from stabmon.engine.step_length.rate_watch import RateWatch
from stabmon.engine.step_observer import StepObserver
from stabmon.engine.updates.qk_updates import with_adapters
from stabmon.engine.updates.weight_updates import UpdatesOfStep
from stabmon.listeners import StepContext
from stabmon.nonfinite.detector import NonFiniteDetector
from stabmon.records import Reading
from stabmon.signals.accumulator import to_host

logger = logging.getLogger("stabmon")


class ReadingBuilder:
    """Maker of readings: at sampled steps, and at others where a listener has news.

    Args:
        observer: attention, gradients and losses of the step.
        optimizers: the run's optimizers.
        detector: non-finite episodes.
        rates: steps that were too long.
        rate_factors: returns the share of its scheduled rate that each group used.
        decays: returns the weight decay of each group.
        boundary: counts failures, and the time that stabmon takes.
        amend: adds to the run's metadata.
    """

    def __init__(
        self,
        observer: StepObserver,
        optimizers: OptimizerAdapter,
        detector: NonFiniteDetector,
        rates: RateWatch,
        rate_factors: Callable[[], Mapping[str, float]],
        decays: Callable[[], Mapping[str, float]],
        boundary: ErrorBoundary,
        amend: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.ranks: RankReducer | None = None
        """Reduces sampled steps over ranks; None to report this rank alone."""
        self.detector = detector
        self.last_step = 0
        """The step of the newest reading."""
        self._observer, self._optimizers, self._rates = observer, optimizers, rates
        self._decays = decays
        self._rate_factors, self._boundary, self._amend = rate_factors, boundary, amend
        self._unseen_reported = 0

    def build(
        self, ctx: StepContext, updates: UpdatesOfStep, *, has_news: bool, watches_losses: bool
    ) -> Reading | None:
        """Return the reading of the step; None where there is nothing to judge.

        Under torch.distributed every rank must call this at the same sampled steps.

        Args:
            ctx: the step.
            updates: the changes that the optimizers made.
            has_news: a listener has found something, though the step may not be sampled.
            watches_losses: report losses that are not finite to the detector.
        """
        seen = self._observer
        sums: Any = seen.measurements.sums
        if ctx.sampled and self.ranks is not None:
            # the first action of all, before anything may fail: other ranks wait for it
            sums = self.ranks.reduce(sums)
        if not seen.forwards.count:
            seen.find_compiled_wrapper()
        if not ctx.sampled and not has_news:
            return None
        layers = to_host(sums) if ctx.sampled else {}
        self._report_unseen()
        if ctx.sampled and not layers and (why := seen.explain_missing_attention()):
            error = RuntimeError(f"step {ctx.step}: {why}")
            self._boundary.failed("sampling", error, traceback=False)
        losses, rates = seen.losses.drain(), self._optimizers.learning_rates()
        for step, loss in losses if watches_losses else ():
            if not math.isfinite(loss):
                self.detector.note_loss(step, loss)
        reading = Reading(
            step=ctx.step,
            loss=losses[-1][1] if losses and losses[-1][0] == ctx.step else None,
            layers=layers,
            info=with_adapters(seen.measurements.info, seen.measurements.modules),
            learning_rate=max(rates.values(), default=None),
            gradients=seen.gradients,
            query_key=updates.query_key,
            losses=losses,
            micro_batches=max(1, ctx.micro_batches),
            non_finite=self.detector.found_since(self.last_step),
            overshoot=self._rates.found_since(self.last_step),
            sampled=ctx.sampled,
            overhead_fraction=self._boundary.overhead_fraction(),
            learning_rates=rates,
            rate_factors=self._rate_factors(),
            updates=updates.groups,
            parts=updates.parts,
            weight_decays=dict(self._decays()),
            query_key_groups=updates.query_key_groups,
        )
        self.last_step = ctx.step
        return reading

    def _report_unseen(self) -> None:
        """Warn of attention that is not seen, and add it to the run's metadata."""
        unseen, words = self._observer.unseen, self._observer.describe_unseen()
        if words is None or len(unseen) == self._unseen_reported:
            return
        self._unseen_reported = len(unseen)
        if rank() == 0:
            logger.warning("%s", words)
        self._amend({"unseen_attention": dict(unseen)})
