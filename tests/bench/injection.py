"""Plant a fault at every function of stabmon that runs on one of two ranks, one run a function.

    python tests/bench/injection.py                  all functions, each rank, observe and guard
    python tests/bench/injection.py --limit 40       40 of each, drawn with a fixed seed
    python tests/bench/injection.py --config observe --rank 1    some hundred functions in half an hour

The functions are found by tracing an unfaulted run in which guard replays, clips and holds. Left
out are functions that torch or the loop calls, before whose first line nothing of stabmon runs.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import functools
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.rank_faults import Outcome, run, same_weights
from tests.support.two_ranks import on_ranks

WAIT = 20
"""Seconds after which the process group gives up; a quarter of it ends a wait of stabmon."""


def judge(config: str, pair: list[Outcome | str], base: Outcome, seconds: float) -> str:
    """Return what came of a faulted run, in one word or a few."""
    if any(isinstance(each, str) for each in pair):
        return f"raised into training: {pair}"
    first, second = (each for each in pair if isinstance(each, Outcome))
    if not all(map(math.isfinite, first.losses + second.losses)):
        return "losses are not finite"
    if not same_weights(first, second):
        return "weights differ between ranks"
    if config == "observe" and not same_weights(first, base):
        return "weights are not those of the unwatched run"
    if left := [*first.left, *second.left]:
        return f"left behind: {', '.join(left)}"
    if not first.fired + second.fired:
        return "fine, not reached"
    return "fine" if seconds < WAIT / 4 else "fine, after a wait"


def plant_everywhere(
    rank: int,
    folder: str,
    *,
    configs: Sequence[str],
    ranks: Sequence[int],
    skip: int,
    limit: int | None,
    seconds: float,
) -> None:
    """Try all functions on each rank in turn, and print counts on rank 0."""
    base = run(None, None)
    ends = time.monotonic() + seconds
    for config in configs:
        for faulty in ranks:
            seen: dict[str, None] = {}
            run(config, None, trace=lambda place, seen=seen: seen.setdefault(place, None))
            found: list[Any] = [sorted(seen)]
            dist.broadcast_object_list(found, src=faulty)
            places = found[0][skip:]
            if limit is not None and limit < len(places):
                places = random.Random(0).sample(places, limit)
            counts: Counter[str] = Counter()
            for place in places:
                late = torch.tensor([float(time.monotonic() > ends)])
                dist.all_reduce(late)
                if late.item():
                    break
                began = time.monotonic()
                try:
                    own: Outcome | str = run(config, place, rank=faulty)
                except Exception as error:
                    own = repr(error)
                took = time.monotonic() - began
                if rank == 0 and took > WAIT / 4:
                    print(f"  {config}, {faulty}, {place}: took {took:.0f} s", flush=True)
                pair: list[Any] = [None, None]
                dist.all_gather_object(pair, own)
                verdict = judge(config, pair, base, took)
                counts[verdict.partition(":")[0]] += 1
                if rank == 0 and sum(counts.values()) % 100 == 0:
                    print(f"  {config}, {faulty}: {sum(counts.values())} tried", flush=True)
                if rank == 0 and not verdict.startswith("fine"):
                    print(f"  {config}, {faulty}, {place}: {verdict}", flush=True)
            if rank == 0:
                tried = f"{sum(counts.values())} of {len(found[0])} functions"
                print(f"{config}, faults on rank {faulty}: {tried}; {dict(counts)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, help="functions of each kind; all without it")
    parser.add_argument("--skip", type=int, default=0, help="functions left out at the start")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time after which it ends")
    parser.add_argument("--config", choices=["observe", "guard"], help="both without it")
    parser.add_argument("--rank", type=int, choices=[0, 1], help="both without it")
    given = parser.parse_args()
    work = functools.partial(
        plant_everywhere,
        configs=["observe", "guard"] if given.config is None else [given.config],
        ranks=[1, 0] if given.rank is None else [given.rank],
        skip=given.skip,
        limit=given.limit,
        seconds=given.seconds,
    )
    with tempfile.TemporaryDirectory() as folder:
        on_ranks([work], Path(folder), seconds=None, wait=WAIT)


if __name__ == "__main__":
    main()
