"""What the callbacks of all ranks agree on before training."""

from __future__ import annotations

import logging

from stabmon._torch.process_group import on_all_ranks
from stabmon.engine.monitor import AttentionStabilityMonitor

logger = logging.getLogger("stabmon")


def settle(monitor: AttentionStabilityMonitor | None) -> None:
    """Let each rank report its own readings, if some rank could not start watching: else it would
    be waited for. Called on every rank.
    """
    try:
        agreed = on_all_ranks(monitor is not None)
    except Exception:
        logger.exception("stabmon could not reach the other ranks; each reports its own readings")
        agreed = False
    if monitor is not None and not agreed:
        monitor.leave_ranks()
