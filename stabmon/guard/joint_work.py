"""Work that the guards of all ranks begin and end together, or stop together."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from stabmon._torch.process_group import rank
from stabmon._torch.ranks.exchange import RankExchange, RankFailed
from stabmon.interventions.run.training_run import TrainingRun

logger = logging.getLogger("stabmon")


class JointWork:
    """This rank's part in the work of all guards, and whether anything has failed in it.

    Args:
        run: the run, whose ``exchange`` is with the other ranks.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.is_sound, self.why = True, ""
        """Nothing failed here in the newest work with other ranks; the reason why it failed."""

    @property
    def exchange(self) -> RankExchange | None:
        """The exchange with other ranks, where this one intervenes with them."""
        exchange = self.run.exchange
        return exchange if exchange is not None and exchange.together else None

    @contextmanager
    def together(self, moment: str, *, quick: bool = False) -> Iterator[None]:
        """Work with the other ranks; where it fails on one, all stop intervening.

        Args:
            moment: the same on all ranks.
            quick: see :meth:`~stabmon._torch.ranks.exchange.RankExchange.joint`.
        """
        exchange = self.run.exchange
        assert exchange is not None
        try:
            with exchange.joint(moment, quick=quick):
                if moment in exchange.due:
                    exchange.due.remove(moment)
                yield
        except RankFailed as error:
            exchange.is_troubled = True
            self.why = str(error)
        except Exception as error:
            self.is_sound, exchange.is_troubled = False, True
            self.why = f"{type(error).__name__}: {error}"
            logger.error("Interventions failed on rank %d: %s", rank(), error, exc_info=error)
            if moment in exchange.due:  # others wait for this rank
                exchange.due.remove(moment)
                exchange.say_failed(moment)
