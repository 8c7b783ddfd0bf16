"""Findings from expectations and measurements, one function per failure mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from stabmon._torch.number_formats import FLOAT16_OVERFLOW, LARGEST
from stabmon.check.config import CheckConfig
from stabmon.check.judging import advice
from stabmon.check.judging.findings import Basis, Finding, ranked
from stabmon.check.measuring.expect import LayerView

ALLOWANCE = {"fused": 2.0, "eager": 1.0}
"""Multiple of ``moved_warning`` allowed on each path.

A fused kernel's rounding is the same in forward and backward, and averages out.
"""


def judge(views: Sequence[LayerView], config: CheckConfig, basis: Basis) -> list[Finding]:
    """Return all findings on these layers, ranked.

    Of each failure mode only the worst place is kept, with the number of the others.

    Args:
        views: the layers, expected and measured.
        config: levels and the format to train in.
        basis: the evidence of the measurements.
    """
    found = [finding for mode in FAILURE_MODES for finding in mode(views, config, basis)]
    return list(ranked([_worst(group) for group in _groups(found)]))


def saturated_softmax(
    views: Sequence[LayerView], config: CheckConfig, basis: Basis
) -> Iterable[Finding]:
    """Find scores too wide at initialisation.

    Rows then look at a few keys only, and no gradient passes the softmax.
    """
    for view in views:
        head, spread = view.widest, float(view.spread[view.widest])
        share = view.expected_share
        if (
            view.untrained is False
            or not math.isfinite(spread)
            or share >= config.condensed_warning
        ):
            continue
        condensed = (
            spread >= view.critical and view.info.softcap is None and view.untrained is not None
        )
        saturated = float(view.measured["saturated_fraction"][head])
        yield Finding(
            "saturated_softmax",
            "error" if condensed else "warning",
            _both(view, basis),
            spread,
            view.critical,
            f"scores have a standard deviation of {spread:.3g} at initialisation, and rows of "
            f"{view.keys} keys condense on a few at "
            f"{view.critical:.2f}; {share:.0%} of the entropy is left, {saturated:.0%} of rows "
            "pass no gradient",
            view.layer,
            head,
            advice.lower_init(view, config),
        )


def scale_missing(
    views: Sequence[LayerView], config: CheckConfig, basis: Basis
) -> Iterable[Finding]:
    """Find scores not divided by the root of the head dimension.

    Layers with a norm or a small initialisation that makes up for it are left out.
    """
    for view in views:
        factor = abs(view.scale) * math.sqrt(view.info.head_dim)
        spread = float(view.spread[view.widest])
        if (
            view.untrained is False
            or view.weights is None
            or view.weights.normed
            or factor < 3
            or not spread > 1.5
        ):
            continue
        condensed = spread >= view.critical
        yield Finding(
            "scale_missing",
            "error" if condensed else "warning",
            _both(view, basis),
            view.scale,
            view.info.head_dim**-0.5,
            f"scores are multiplied by {view.scale:.3g} where 1/sqrt({view.info.head_dim}) = "
            f"{view.info.head_dim**-0.5:.3g} is usual, and "
            f"have a standard deviation of {spread:.3g} instead of {spread / factor:.3g}; they "
            f"also grow {factor:.3g} times as fast",
            view.layer,
            None,
            advice.add_scale(view),
        )


def head_dim_too_small(
    views: Sequence[LayerView], config: CheckConfig, basis: Basis
) -> Iterable[Finding]:
    """Find heads with too few dimensions to express most patterns over a row."""
    for view in views:
        width = view.info.head_dim
        if width >= config.least_head_dim or "query_size" not in view.measured:
            continue
        yield Finding(
            "head_dim_too_small",
            "warning",
            "analytic",
            width,
            config.least_head_dim,
            f"{view.info.heads} heads of dimension {width}: each head's scores over {view.keys} "
            f"keys are a matrix of rank {width}",
            view.layer,
            None,
            advice.fewer_heads(view, config),
        )


def inputs_not_normalised(
    views: Sequence[LayerView], config: CheckConfig, basis: Basis
) -> Iterable[Finding]:
    """Find projections with inputs far from unit size.

    Scores are then larger than the weights suggest.
    """
    for view in views:
        if view.untrained is not True or not view.input_size >= 3:
            continue
        yield Finding(
            "inputs_not_normalised",
            "warning",
            "measured" if basis != "analytic" else basis,
            view.input_size,
            3.0,
            "the inputs of the query and key projections have a root mean square of "
            f"{view.input_size:.3g}, and scores grow with its square",
            view.layer,
            None,
            advice.add_norm(view),
        )


def damaged_head(
    views: Sequence[LayerView], config: CheckConfig, basis: Basis
) -> Iterable[Finding]:
    """Find heads with weights far from those of the layer's other heads."""
    for view in views:
        weights = view.weights
        if weights is None or weights.normed or view.info.heads < 3:
            continue
        size = weights.query * weights.key
        median = float(np.median(size))
        if not median > 0:
            continue
        score = view.measured["max_logit"]
        for head in np.flatnonzero(size >= config.damaged * median).tolist():
            others = float(np.median(np.delete(score, head)))
            shows = (
                score[head] >= 3 * abs(others) or view.measured["saturated_fraction"][head] >= 0.9
            )
            side = (
                "W_q"
                if weights.query[head] / np.median(weights.query)
                > weights.key[head] / np.median(weights.key)
                else "W_k"
            )
            yield Finding(
                "damaged_head",
                "error" if shows else "warning",
                _both(view, basis),
                float(size[head] / median),
                config.damaged,
                f"|W_q| |W_k| is {size[head] / median:.3g} times that of the other heads (mostly "
                f"{side}), its largest score "
                f"{score[head]:.3g} where theirs is {others:.3g}",
                view.layer,
                head,
                advice.repair_head(view, head, side, float(size[head] / median)),
            )


def overflow_risk(
    views: Sequence[LayerView], config: CheckConfig, basis: Basis
) -> Iterable[Finding]:
    """Find float16 products of query and key near the largest float16.

    They overflow only on a path that writes them in float16.
    """
    if config.dtype != "fp16":
        return
    for view in views:
        if view.info.fused:
            continue
        product = view.largest_product
        head = int(np.argmax(np.nan_to_num(product, nan=-math.inf)))
        value = float(product[head])
        if not value >= config.product_warning:
            continue
        limit = 2 * config.product_warning
        yield Finding(
            "overflow_risk",
            "critical" if value >= LARGEST["float16"] else "error" if value >= limit else "warning",
            basis,
            value,
            limit if value >= limit else config.product_warning,
            f"the product of query and key reaches {value:.5g} before it is scaled, and float16 "
            f"is inf from {FLOAT16_OVERFLOW:.0f} on",
            view.layer,
            head,
            advice.avoid_overflow(view),
        )


def precision_insufficient(
    views: Sequence[LayerView], config: CheckConfig, basis: Basis
) -> Iterable[Finding]:
    """Find heads with attention moved by rounding to the training format.

    Where a position bias is added to scores (absolute ALiBi), mostly the bias is rounded, alike in
    every row and step, and models are known to train so: a warning at most.
    """
    if config.dtype == "fp32":
        return
    for view in views:
        path = "fused" if view.info.fused else "eager"
        share = view.measured[f"moved/{path}/{config.dtype}"]
        head = int(np.argmax(np.nan_to_num(share, nan=-1.0)))
        allowed = config.moved_warning * ALLOWANCE[path]
        if not share[head] >= allowed:
            continue
        error = share[head] >= 2 * allowed and not view.biased
        yield Finding(
            "precision_insufficient",
            "error" if error else "warning",
            basis,
            float(share[head]),
            2 * allowed if error else allowed,
            f"rounding to {config.dtype} moves {share[head]:.0%} of a mean row's probability "
            f"({path} path, scores up to "
            f"{view.measured['max_logit'][head]:.3g})",
            view.layer,
            head,
            advice.keep_bits(view, head, config),
        )


FailureMode = Callable[[Sequence[LayerView], CheckConfig, Basis], Iterable[Finding]]
FAILURE_MODES: tuple[FailureMode, ...] = (
    *(overflow_risk, saturated_softmax, scale_missing, damaged_head, precision_insufficient),
    *(inputs_not_normalised, head_dim_too_small),
)


def _both(view: LayerView, basis: Basis) -> Basis:
    """Return the basis of a finding from both weights and measurements."""
    if basis == "analytic":
        return basis
    return "measured" if view.weights is None else "analytic and measured"


def _groups(findings: Iterable[Finding]) -> list[list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for each in findings:
        groups.setdefault(each.name, []).append(each)
    return list(groups.values())


def _worst(group: list[Finding]) -> Finding:
    worst = ranked(group)[0]
    places = {(each.layer.partition("#")[0] if each.layer else None, each.head) for each in group}
    return replace(worst, also=len(places) - 1)
