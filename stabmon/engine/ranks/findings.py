"""Choose among the non-finite values that ranks have found the one nearest to a cause."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from datetime import timedelta

from stabmon._torch.process_group import default_store, rank, world_size
from stabmon._torch.ranks.share import RankShare
from stabmon.records import NonFinite

logger = logging.getLogger("stabmon")

_WAIT = timedelta(seconds=10)
"""Longest wait of rank 0 for the findings of others, once a non-finite episode."""
_CAUSES_FIRST = ("parameter", "input", "activation", "score", "loss", "gradient")
"""Kinds of findings, those that name a cause first.

A bad gradient reaches every rank, its cause is on one.
"""


def nearest_cause(found: NonFinite | None, subject: str, share: RankShare) -> NonFinite | None:
    """Return on rank 0 the finding nearest to a cause, on others their own.

    No collective: rank 0 reads what the others left in the store.

    Args:
        found: this rank's finding.
        subject: the same on all ranks, and another for each step.
        share: gives the common names of layers and heads.

    Returns:
        The finding, with the rank that made it in ``detail``.
    """
    store = default_store() if world_size() > 1 else None
    if store is None:
        return found
    keys = [f"{subject}/{each}" for each in range(world_size())]
    if found is not None and found.layer is not None:
        head = found.head
        head = None if head is None else head + share.span(found.layer, 0)[0]
        found = replace(found, layer=share.common(found.layer), head=head)
    store.set(keys[rank()], json.dumps(None if found is None else found.to_dict()))
    if rank() != 0:
        return found
    try:
        store.wait(keys, _WAIT)
    # some rank found nothing, or found it too late: only its finding is missing
    except Exception as error:
        logger.info("no finding of some rank for %s: %s", subject, error)
    shared = [json.loads(store.get(key)) if store.check([key]) else None for key in keys]
    findings = [
        NonFinite.from_dict(each, detail=f"{each['detail']} (rank {number})")
        for number, each in enumerate(shared)
        if each
    ]
    return min(
        findings,
        key=lambda each: (_CAUSES_FIRST.index(each.kind), each.layer is None),
        default=found,
    )
