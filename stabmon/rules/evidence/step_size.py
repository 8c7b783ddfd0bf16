"""Evidence of optimizer steps that are too long."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from stabmon.records import Overshoot, Reading
from stabmon.rules.tracking.history import History

SLACK = 1.1
"""Multiple of the fitting rate above which the rate used is still too high."""


def update_share(reading: Reading) -> float:
    """Return the share of W_q and W_k that a step changed, the median over layers.

    NaN where it is unknown.
    """
    shares = np.array([moved.relative_update for moved in reading.query_key.values()])
    known = shares[np.isfinite(shares)]
    return float(np.median(known)) if len(known) else float("nan")


def shares_of_largest(readings: Sequence[Reading]) -> np.ndarray:
    """Return ``[T]`` shares as of :func:`update_share`, of the largest W_q and W_k up to then.

    Weights that a clip has made smaller are moved as far as ever, and that is no longer a step.

    >>> from stabmon.records import QKUpdate
    >>> moves = [QKUpdate(1.0, weight, 0.1) for weight in (1.0, 2.0, 0.1)]
    >>> shares_of_largest([Reading(at, None, {}, query_key={"a": m}) for at, m in enumerate(moves)])
    array([0.1 , 0.05, 0.05])
    """
    largest: dict[str, float] = {}
    shares = []
    for reading in readings:
        own = []
        for layer, moved in reading.query_key.items():
            largest[layer] = max(largest.get(layer, 0.0), moved.weight)
            own.append(moved.update / largest[layer] if largest[layer] > 0 else np.nan)
        known = np.array([each for each in own if np.isfinite(each)])
        shares.append(float(np.median(known)) if len(known) else np.nan)
    return np.array(shares)


def rates_of_groups(history: History) -> dict[str, np.ndarray]:
    """Return the rates used, ``[T]`` for each parameter group.

    The largest over groups, under the empty key, where readings do not name groups.
    """
    rates = [np.nan if r.learning_rate is None else r.learning_rate for r in history.readings]
    return history.used_rates or {"": np.array(rates)}


def highest_before_jump(
    rates: np.ndarray, *, jump: float, hysteresis: float, min_history: int
) -> float | None:
    """Return the highest rate before a jump that the newest rate is still above.

    A warm-up rises by little from reading to reading, and a warm restart comes back to a rate that
    was there before: neither is a jump.

    Args:
        rates: ``[T]`` oldest first; NaN where unknown.
        jump: multiple of the highest rate so far at which a rate has jumped.
        hysteresis: share of that multiple above which it stays so.
        min_history: known rates before any is judged.

    Returns:
        None where there was no such jump, or the newest rate is unknown.

    >>> rates = np.array([1.0, 2.0, 3.0, 2.0, 20.0, 20.0])
    >>> highest_before_jump(rates, jump=4.0, hysteresis=0.6, min_history=3)
    3.0
    """
    highest, jumped = 0.0, False
    for known, rate in enumerate(rates[np.isfinite(rates)].tolist()):
        level = jump * highest * (hysteresis if jumped else 1.0)
        jumped = known >= min_history and 0 < level <= rate
        if not jumped:
            highest = max(highest, rate)
    return highest if jumped and len(rates) and np.isfinite(rates[-1]) else None


def heads_break(history: History) -> bool:
    """Return True if growing scores or collapsing entropy is open at any head."""
    return any(history.is_open(kind).any() for kind in ("logit_growth", "entropy_collapse"))


def rates_too_high(history: History) -> dict[str, float]:
    """Return the rate of each parameter group whose steps were found to be too long.

    Empty where no step was, where the rates have since come down to what fits, and where steps
    were only a little too long and no head breaks, or weights were changed since: they speak of
    those they were made with.
    """
    found = history.overshoot
    if found is None:
        return {}
    if found.how == "brisk" and (history.treated or not heads_break(history)):
        return {}
    if history.latest.overshoot is not None and found.how != "brisk":
        return {key: found.rates[key] for key in found.fitting}
    decays = found.how == "decay"
    used = history.latest.weight_decays if decays else history.latest.used_rates
    return {
        key: used[key] for key, rate in found.fitting.items() if used.get(key, 0.0) > SLACK * rate
    }


def overshoot_advice(found: Overshoot, history: History) -> str:
    """Return the rate to set, and the evidence for it, in words."""
    several = len(history.latest.learning_rates) > len(found.fitting)
    gained = "nothing" if found.gain_ratio <= 0 else f"{found.gain_ratio:.0%}"
    first = f"the first step gained {gained} of what its gradient foretold on its own batch"
    seen = {
        "brisk": f"step {found.step} gained {gained} of what its gradient foretold on its own batch, "
        "and heads break",
        "first_step": first,
        "steps": f"steps gain {gained} of what their gradients foretell on their own batches",
        "torn": f"step {found.step} raised the loss of its own batch by {found.rise:.0%}",
        "leap": f"the loss leapt {found.rise:.0%} above the largest before",
    }[found.how]
    return (
        f"Lower {name_rates(found.fitting) if several else 'the rate'} to "
        f"{found.fitting_rate:.2g}: at {found.rate:.2g} {seen}. Start again there, or from a "
        f"checkpoint before step {found.step}; what attention does after it follows from this."
    )


def jump_advice(found: Overshoot) -> str:
    """Return the groups whose rate jumped in words, with the rates to set them back to."""
    each = [
        f"{key} {found.groups.get(key, '')}".strip()
        + f" from {before:.2g} at most to {found.rates[key]:.2g}"
        for key, before in sorted(found.fitting.items())
    ]
    moved = max(found.updates.values(), default=float("nan"))
    return (
        f"Look at the schedule and the parameter groups: at step {found.step} the rate rose in "
        f"{'; '.join(each)}. One step at that rate changes {moved:.0%} of the group. Set it back, "
        f"cap it there (cap_learning_rate), or go back to a checkpoint before step {found.step}."
    )


def decay_advice(found: Overshoot) -> str:
    """Return the groups whose weight decay jumped in words, with the decay to set them back to."""
    each = [
        f"{key} {found.groups.get(key, '')}".strip()
        + f" from {before:.2g} to {found.rates[key]:.2g}"
        for key, before in sorted(found.fitting.items())
    ]
    taken = max(found.updates.values(), default=float("nan"))
    return (
        f"Look at what sets the weight decay: at step {found.step} it rose in {'; '.join(each)}, "
        f"and now takes {taken:.1%} of the weights in every step. Set it back, cap it there "
        f"(cap_learning_rate), or go back to a checkpoint before step {found.step}."
    )


def name_rates(groups: Iterable[str]) -> str:
    """Return the rate of some parameter groups in words."""
    return f"the rate of parameter group {', '.join(sorted(groups))} (optimizer.group, from 0)"
