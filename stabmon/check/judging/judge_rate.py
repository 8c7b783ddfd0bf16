"""A finding on the learning rate asked about, from a sweep."""

from __future__ import annotations

from stabmon._torch.snippets import QK_NORM
from stabmon.check.judging.findings import Finding, Recommendation
from stabmon.check.sweep.sweep import Sweep


def judge_rate(found: Sweep, rate: float | None) -> Finding | None:
    """Judge a learning rate by the limit from a sweep.

    Args:
        found: the sweep.
        rate: the peak rate at full width, or None.

    Returns:
        An error for a rate above the limit's interval, a warning within it; None below it, or
        without a rate or a limit.
    """
    limit = found.full_limit
    if rate is None or limit is None:
        return None
    shrink = found.width / found.full_width
    low, high = (
        (each if each is not None else found.limit or 0.0) * shrink
        for each in (found.low, found.high)
    )
    if rate < low:
        return None
    narrow = (
        ""
        if shrink == 1
        else f" ({found.limit:.2g} at width {found.width}, carried over as 1 / width)"
    )
    return Finding(
        "learning_rate_too_high",
        "error" if rate > high else "warning",
        "measured",
        rate,
        limit,
        f"at a peak rate of {rate:g} scores are expected to saturate attention: the limit is "
        f"{limit:.2g}, with 90 % confidence "
        f"{low:.2g} to {high:.2g}{narrow}",
        None,
        None,
        Recommendation(
            f"lower the peak rate to {low / 2:.2g}, or normalise queries and keys",
            "optimizer",
            f"lr={low / 2:.2g}  # or {QK_NORM}",
            f"largest scores {(rate * 2 / low) ** (found.exponent or 1.0):.3g} times smaller "
            "early on; qk-norm: bounded at any rate",
            "Wortsman et al. 2023, arXiv:2309.14322; rates over width: Yang et al. 2022, "
            "arXiv:2203.03466",
        ),
    )
