"""Come to every exchange of a step with the other ranks, also where this rank has failed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from torch import nn

from stabmon._torch.process_group import rank
from stabmon._torch.ranks.exchange import RankExchange, RankFailed, announce, decline
from stabmon._torch.ranks.identity import has_flat_shards, joins_unequal_batches
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.engine.ranks.offer import Offer
from stabmon.engine.recording.reading_builder import ReadingBuilder
from stabmon.guard import Guard

logger = logging.getLogger("stabmon")


class StepExchanges:
    """This rank's part in the exchanges of each step, and in agreeing on a state to go on from.

    What is due is known before a step's work begins. Where that work fails here, the exchange is
    come to all the same, and says so. Without other ranks nothing is done.

    Args:
        exchange: with the other ranks; None where this process reports alone.
        readings: reduces readings over ranks.
        guard: intervenes on all ranks alike.
        boundary: counts failures.
    """

    def __init__(
        self,
        exchange: RankExchange | None,
        readings: ReadingBuilder,
        guard: Guard,
        boundary: ErrorBoundary,
    ) -> None:
        self.exchange, self.boundary = exchange, boundary
        self._readings, self._guard = readings, guard
        self._has_resumed = False
        """This rank has told the others whether it has a state to go on from."""

    @property
    def together(self) -> bool:
        """Other ranks do the same as this one."""
        return self.exchange is not None and self.exchange.together

    @property
    def is_troubled(self) -> bool:
        """Something has failed on some rank in this step, so that all are to stop intervening."""
        return self.exchange is not None and self.exchange.is_troubled

    def leave_if_unsupported(self, model: nn.Module) -> None:
        """Report alone where ranks may not make the same steps, or their weights cannot be read."""
        if self.exchange is None or not self.together:
            return
        if joins_unequal_batches(model):
            self.exchange.leave("training runs under Join, where ranks may end at different steps")
        elif has_flat_shards(model):
            self.exchange.leave(
                "FSDP1 (FullyShardedDataParallel) is not supported; use fully_shard (FSDP2)"
            )

    def expect_first(self, first: Callable[[], int]) -> None:
        """Note which step is sampled first, until ranks have met.

        Args:
            first: returns that step.
        """
        if self.exchange is not None and not self.exchange.has_met:
            self.exchange.agenda = first()

    def expect_gradients(self) -> None:
        """Note what is due before the optimizer's step."""
        ranks, guard = self.exchange, self._guard
        if ranks is not None and ranks.state == "together" and guard.automatic:
            ranks.due = ["gradients"] * (guard.checks_gradients and not ranks.equal_gradients)

    def expect_step(self, step: int) -> None:
        """Note what is due after an optimizer's step.

        Args:
            step: the step that was made, counted from 1.
        """
        ranks = self.exchange
        if ranks is not None and ranks.state == "together":
            ranks.due = ["held"] * ranks.holding
            if step >= ranks.agenda:
                ranks.due += ["reading"] + ["verdict"] * self._guard.automatic

    def expect_nothing(self) -> None:
        """Note that nothing is due, as where no step is made."""
        if self.exchange is not None:
            self.exchange.due = []

    def catch_up(self, step: int, last: str = "") -> None:
        """Come to the exchanges that this rank has missed, and say there that it has failed.

        Args:
            step: the step that was made.
            last: the last of them; empty for all, at the end of the step.
        """
        ranks = self.exchange
        if ranks is None or (last and last not in ranks.due):
            return
        try:
            while ranks.due and ranks.state == "together" and (not last or last in ranks.due):
                moment = ranks.due[0]
                if moment == "reading" and self._readings.ranks is not None:
                    with contextlib.suppress(RankFailed):
                        self._readings.ranks.reduce(step, Offer)
                elif moment != "verdict" or not ranks.is_troubled:
                    ranks.say_failed(moment)
                    ranks.is_troubled = True
                ranks.due = [each for each in ranks.due if each != moment]
            if ranks.is_troubled and not last:
                self._guard.stop_together()
        except Exception as error:
            self.boundary.failed("exchange", error)
            ranks.leave(f"rank {rank()} failed: {type(error).__name__}: {error}")

    def resume_without_state(self) -> None:
        """Tell the other ranks that this one has no state to go on from."""
        ranks = self.exchange
        if ranks is not None and ranks.together and not self._has_resumed:
            self._has_resumed = True
            decline(f"{ranks.name}/resume", "none")

    def all_resume(self, step: int) -> bool:
        """Return whether all ranks have the state of the same step; say so where not.

        Args:
            step: the step of this rank's state.
        """
        ranks = self.exchange
        if ranks is None or not ranks.together or ranks.has_met:
            return True
        words = ["none"] if self._has_resumed else announce(f"{ranks.name}/resume", str(step))
        self._has_resumed = True
        if words and set(words) == {str(step)}:
            return True
        logger.warning(
            "stabmon: all ranks start with an empty history: the state of step %d is not on every "
            "rank; give every rank the same state, before its first forward",
            step,
        )
        return False
