"""Assemble the reading of a step from everything measured in it."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from stabmon._torch.optimizer_adapter import OptimizerAdapter
from stabmon._torch.process_group import rank
from stabmon._torch.ranks.exchange import RankExchange, RankFailed
from stabmon._torch.ranks.share import RankShare
from stabmon.capture.coverage.witness import listed
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.engine.rank_reducer import RankReducer
from stabmon.engine.ranks.groups import GroupFacts
from stabmon.engine.ranks.offer import GRADIENT, PART, QUERY_KEY, Offer, Shared, kind_of
from stabmon.engine.sampling.schedule import Schedule
from stabmon.engine.step_length.rate_watch import RateWatch
from stabmon.engine.step_observer import StepObserver
from stabmon.engine.updates.qk_updates import with_adapters
from stabmon.engine.updates.weight_updates import UpdatesOfStep
from stabmon.listeners import StepContext
from stabmon.nonfinite.detector import NonFiniteDetector
from stabmon.records import LayerInfo, PartChange, QKUpdate, Reading
from stabmon.rules import RULES
from stabmon.signals.accumulator import to_host

logger = logging.getLogger("stabmon")


NEEDED = ("gradients", "query_key")
"""Fields of a reading that rules need, and that some runs cannot give."""
PATIENCE = 3
"""Samples without one of them after which it is said."""


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
        schedule: chooses the next sample.
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
        schedule: Schedule,
    ) -> None:
        self.ranks: RankReducer | None = None
        """Reduces sampled steps over ranks; None to report this rank alone."""
        self.exchange: RankExchange | None = None
        """With the other ranks, also after they were lost; None on one process."""
        self.detector = detector
        self.last_step = 0
        """The step of the newest reading."""
        self._observer, self._optimizers, self._rates = observer, optimizers, rates
        self._decays = decays
        self._rate_factors, self._boundary, self._amend = rate_factors, boundary, amend
        self._schedule, self._unseen_reported = schedule, 0
        self._own_losses: tuple[tuple[int, float], ...] = ()
        """(step, loss) of this rank's steps since the last reading, as given to others."""
        self._counted: set[str] = set()
        """Layers whose rows were looked at, which a device makes the host wait for."""
        self._unwatched: dict[str, str] = {}
        self._without: Counter[str] = Counter(dict.fromkeys(NEEDED, 0))
        """Samples so far without each field of :data:`NEEDED`; those that were seen are left out."""
        self._short_rows: set[str] = set()
        """Layers whose rows were found to see few keys."""

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
        shared = self._exchange(ctx, updates) if ctx.sampled else None
        if shared is not None:
            sums = shared.sums
        is_found = not seen.forwards.count and seen.find_compiled_wrapper()
        if not ctx.sampled and not has_news:
            return None
        layers = to_host(sums) if ctx.sampled else {}
        if shared is None:
            layers = self.share.named(layers)
        self._report_unseen()
        self._report_short_rows(layers)
        if ctx.sampled and not layers and not is_found:
            self._report_missing(ctx.step)
        gradients, query_key = _whole_norms(seen.gradients, updates, shared, self.share)
        parts = _whole_parts(updates.parts, shared, self.share)
        losses, groups = self._losses(shared), self._groups(updates)
        if shared is not None and self.share.is_staged:
            groups = GroupFacts.of(shared.groups)
        for step, loss in losses if watches_losses else ():
            if not math.isfinite(loss):
                self.detector.note_loss(step, loss)
        reading = Reading(
            step=ctx.step,
            loss=losses[-1][1] if losses and losses[-1][0] == ctx.step else None,
            layers=layers,
            info=self._info(),
            learning_rate=max(groups.rates.values(), default=None),
            gradients=gradients,
            query_key=query_key,
            losses=losses,
            micro_batches=max(1, ctx.micro_batches),
            non_finite=self.detector.found_since(self.last_step),
            overshoot=self._rates.found_since(self.last_step),
            sampled=ctx.sampled,
            overhead_fraction=self._boundary.overhead_fraction(),
            learning_rates=dict(groups.rates),
            rate_factors=dict(groups.factors),
            updates=dict(groups.updates),
            parts=parts,
            weight_decays=dict(groups.decays),
            query_key_groups=groups.query_key,
            rank_losses=() if shared is None else shared.rank_losses,
        )
        self.last_step = ctx.step
        if ctx.sampled and layers:
            self._report_unwatched(reading, are_shards=bool(updates.partial))
        if ctx.sampled and shared is None:
            self._schedule.follow(ctx.step, self._schedule.plan(reading))
        self._schedule.add(reading)
        return reading

    @property
    def share(self) -> RankShare:
        """Layers and heads of the run that this rank holds."""
        return RankShare() if self.exchange is None else self.exchange.share

    def _info(self) -> dict[str, LayerInfo]:
        """Return facts about each layer of the reading, by common names."""
        seen, share = self._observer.measurements, self.share
        own = {
            share.common(layer): replace(each, heads=share.span(layer, each.heads)[1])
            for layer, each in with_adapters(seen.info, seen.modules).items()
        }
        return own if self.ranks is None else {**self.ranks.facts, **own}

    def _exchange(self, ctx: StepContext, updates: UpdatesOfStep) -> Shared | None:
        """Exchange a sampled step with other ranks; None where this one is alone."""
        if self.ranks is None or not self.ranks.active:
            return None
        try:
            shared = self.ranks.reduce(ctx.step, functools.partial(self._offer, ctx, updates))
        except RankFailed:
            return None
        self._schedule.agree(ctx.step, self.ranks.exchange.agenda)
        return shared

    def _offer(self, ctx: StepContext, updates: UpdatesOfStep) -> Offer:
        """Return what this rank gives to the others, by what it knows before it hears of them."""
        seen = self._observer
        self._own_losses += seen.losses.drain()
        gradients = seen.gradients
        known = Reading(
            ctx.step,
            None,
            self.share.named(to_host(seen.measurements.sums)),
            losses=self._own_losses,
            gradients=gradients,
            query_key=updates.query_key,
            non_finite=self.detector.found_since(self.last_step),
            learning_rates=self._optimizers.learning_rates(),
            rate_factors=self._rate_factors(),
            updates=updates.groups,
        )
        ahead, least = self._schedule.ahead(ctx.step, self._schedule.plan(known))
        return Offer(
            seen.measurements.sums,
            _squares(seen.gradient_squares, updates, updates.partial),
            _squares(
                {layer: norm * norm for layer, norm in gradients.items()},
                updates,
                updates.query_key.keys() - updates.partial,
            )
            | _part_squares(updates.parts),
            self._groups(updates).offered(),
            self._own_losses,
            ahead,
            least,
            gradients.get("", math.nan),
            with_adapters(seen.measurements.info, seen.measurements.modules),
            seen.measurements.modules,
        )

    def _groups(self, updates: UpdatesOfStep) -> GroupFacts:
        """Return the facts about this rank's parameter groups."""
        return GroupFacts(
            self._optimizers.learning_rates(),
            self._rate_factors(),
            updates.groups,
            self._decays(),
            updates.query_key_groups,
        )

    def _losses(self, shared: Shared | None) -> tuple[tuple[int, float], ...]:
        """Return (step, loss) since the last reading: the mean over ranks where it is known."""
        own, self._own_losses = dict(self._own_losses + self._observer.losses.drain()), ()
        common = {} if shared is None else dict(shared.losses)
        last = self.last_step
        return tuple(sorted((own | {at: x for at, x in common.items() if at > last}).items()))

    def _report_missing(self, step: int) -> None:
        """Count and log a sampled step without attention."""
        if why := self._observer.explain_missing_attention():
            error = RuntimeError(f"step {step}: {why}")
            self._boundary.failed("sampling", error, traceback=False)

    def _report_unseen(self) -> None:
        """Warn of attention that is not seen, and add it to the run's metadata."""
        unseen, words = self._observer.unseen, self._observer.describe_unseen()
        if words is None or len(unseen) == self._unseen_reported:
            return
        self._unseen_reported = len(unseen)
        if rank() == 0:
            logger.warning("%s", words)
        self._amend({"unseen_attention": dict(unseen)})

    def _report_unwatched(self, reading: Reading, *, are_shards: bool) -> None:
        """Say once what is unknown in the first samples, why, and which rules cannot fire so."""
        for name in [name for name in self._without if getattr(reading, name)]:
            del self._without[name]
        self._without.update(list(self._without))
        late = [name for name, count in self._without.items() if count == PATIENCE]
        words = {name: self._why_unwatched(name, are_shards) for name in late}
        if not late:
            return
        self._unwatched |= words
        self._amend({"unwatched": dict(self._unwatched)})
        for name, each in words.items() if rank() == 0 else ():
            # a run without an optimizer has been told of it, and one without backward means it
            is_news = name == "gradients" and self._observer.has_backward
            logger.log(
                logging.WARNING if is_news else logging.INFO, "stabmon does not watch %s", each
            )

    def _why_unwatched(self, name: str, are_shards: bool) -> str:
        """Return what is not watched, why, and the rules that need it, in words."""
        rules = ", ".join(sorted(rule for rule, cls in RULES.items() if name in cls.reads))
        if name == "gradients":
            return f"gradient norms ({self._observer.why_no_gradients}): {rules} cannot fire"
        why = "W_q and W_k of no layer are found by name and shape"
        if not self._optimizers.groups():
            why = "no optimizer is known: give it to the monitor"
        elif are_shards:
            why = (
                "they are sharded, and this rank reports alone: give every rank a monitor with "
                "reduce_ranks=True"
            )
        return f"how far steps move W_q and W_k ({why}): {rules} miss what single layers do"

    def _report_short_rows(self, layers: Mapping[str, Any]) -> None:
        """Say once of each layer that its rows see fewer keys than some signal asks for.

        In the log and the run's metadata; a warning where the signal then has no value.
        """
        seen = self._observer.measurements
        if layers.keys() <= self._counted:
            return
        self._counted |= layers.keys()
        for signal, least in seen.least_visible.items():
            few = {layer: most for layer, most in seen.most_visible.items() if most < least}
            new = few.keys() & layers.keys() - self._short_rows
            if not new:
                continue
            self._short_rows |= new
            self._amend({"few_visible_keys": few})
            if rank() != 0:
                continue
            null = {layer: "1 key a row" for layer in sorted(new) if few[layer] < 2}
            short = {layer: f"{few[layer]} keys" for layer in sorted(new) if few[layer] >= 2}
            if null:
                logger.warning("stabmon measures no %s of %s", signal, listed(null))
            if short:
                logger.info(
                    "stabmon: no row of %s sees %d keys, so that %s is the mean over the rows that "
                    "see at least half of the most there, and varies more than over long rows",
                    *(listed(short), least, signal),
                )


def _squares(
    gradients: Mapping[str, float], updates: UpdatesOfStep, layers: Collection[str]
) -> dict[str, list[float]]:
    """Return squared norms for the ranks to add.

    Args:
        gradients: squared norms of gradients, by layer.
        updates: the changes of the step.
        layers: those whose changes of W_q and W_k count.
    """
    found = {f"{GRADIENT}{layer}": [square] for layer, square in gradients.items()}
    for layer in sorted(layers):
        moved = updates.query_key[layer]
        norms = (moved.gradient, moved.weight, moved.update)
        found[f"{QUERY_KEY}{layer}"] = [norm * norm for norm in norms]
    return found


def _whole_norms(
    gradients: Mapping[str, float], updates: UpdatesOfStep, shared: Shared | None, share: RankShare
) -> tuple[dict[str, float], dict[str, QKUpdate]]:
    """Return the norms of gradients and of W_q and W_k, as ranks have added them.

    Those of weights that each rank holds whole are this rank's own, but where ranks are stages.
    """
    found = {share.common(layer) if layer else "": norm for layer, norm in gradients.items()}
    whole = {
        share.common(layer): each
        for layer, each in updates.query_key.items()
        if layer not in updates.partial
    }
    if share.is_staged and shared is not None:
        found.pop("", None)  # of this stage alone
    for key, squares in ({} if shared is None else shared.squares).items():
        norms = [math.sqrt(square) for square in squares]
        if kind_of(key) == GRADIENT:
            found[key.removeprefix(GRADIENT)] = norms[0]
        elif kind_of(key) == QUERY_KEY:
            whole[key.removeprefix(QUERY_KEY)] = QKUpdate(*norms)
    return found, whole


def _part_squares(parts: Mapping[str, PartChange]) -> dict[str, list[float]]:
    """Return the squared norms of each part's weights, of those before, and of the update."""
    return {
        f"{PART}{part}": [
            norm * norm for norm in (each.weight, each.before, each.update * each.weight)
        ]
        for part, each in parts.items()
    }


def _whole_parts(
    parts: Mapping[str, PartChange], shared: Shared | None, share: RankShare
) -> dict[str, PartChange]:
    """Return the changes of the parts of all stages, by common names; else those of this rank."""
    if not share.is_staged or shared is None:
        return {share.common(part): each for part, each in parts.items()}
    found = {}
    for key, squares in shared.squares.items():
        if kind_of(key) == PART:
            weight, before, update = map(math.sqrt, squares)
            share_of_weight = update / weight if weight > 0 else math.nan
            found[key.removeprefix(PART)] = PartChange(weight, before, share_of_weight)
    return found
