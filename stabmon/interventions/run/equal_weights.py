"""Make the weights of data-parallel ranks equal again, after one of them failed at an edit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from stabmon._torch.process_group import rank
from stabmon._torch.ranks.exchange import RankExchange
from stabmon.interventions.run.snapshots import bytes_of, named_tensors, stepped
from stabmon.interventions.run.training_run import TrainingRun


@torch.no_grad()
def make_equal(run: TrainingRun, exchange: RankExchange, *, sound: bool) -> str:
    """Copy the weights of the first sound rank to all others, where they differ.

    To be called on all ranks, once nothing is held any more. Costs one pass over all weights and
    the optimizer's state, and their transfer where they differ.

    Args:
        run: the run, of which each rank holds a replica.
        exchange: with the other ranks.
        sound: nothing failed on this rank.

    Returns:
        What was done, in words; empty where all were equal.

    Raises:
        RankFailed: where that is not possible.
    """
    with exchange.joint("equal weights"):
        tensors = [tensor.detach() for _, tensor in named_tensors(run)]
        tensors += [
            value
            for parameter, state in stepped(run)
            for _, value in sorted(state.get(parameter, {}).items())
            if isinstance(value, Tensor)
        ]
        kinds = float(_digest([repr([(tuple(each.shape), each.dtype) for each in tensors])]))
        bits = float(_digest([bytes_of(each.cpu()) for each in tensors]))
        first = -float(rank()) if sound else -float("inf")
        found = exchange.meet("weights", [kinds, -kinds, bits, -bits, first])
        if found[2] == -found[3]:
            return ""
        if found[0] != -found[1] or found[4] == -float("inf"):
            return (
                "weights may differ between ranks, and cannot be made equal: start again from a "
                "checkpoint"
            )
        source = int(-found[4])
        for each in tensors:
            exchange.copy_from(each, source)
        return f"weights of all ranks are those of rank {source} again"


def _digest(parts: Sequence[object]) -> int:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)  # type: ignore[arg-type]
    return int.from_bytes(found.digest()[:6], "big")
