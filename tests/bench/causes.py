"""Cause that an issue names, and the causes that are right for each kind of fault."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stabmon.records import StabilityIssue

OF_ATTENTION = (
    "entropy_collapse",
    "logit_growth",
    "overflow_risk",
    "precision_insufficient",
    "attention_spike",
    "high_curvature",
    "gradient_vanishing",
)
"""Types of issue that say attention is at fault."""
RIGHT: Mapping[str, frozenset[str]] = {
    kind: frozenset(causes.split())
    for kind, causes in {
        # byte_gpt
        "rate": "rate",
        "rate_spike": "rate",
        "optimizer": "rate",
        "query_key_rate": "query_key",
        "scale": "start scale",
        "scale_ramp": "scale",
        "initialisation": "start",
        "query_key_jump": "jump weights",
        "exp_softmax": "exp_softmax",
        "format": "format",
        "labels": "data",
        "batch": "data",
        "weight_decay": "weight_decay",
        "embedding": "embedding",
        "mlp": "mlp",
        "head": "head",
        # the own testbed
        "qk_ramp": "weights",
        "qk_jump": "jump weights",
        "qk_rate": "query_key",
        "rate_ramp": "rate",
        "temperature": "scale",
        "init": "start",
        "precision": "format",
        "bad_data": "data",
        "not_finite": "gradient",
    }.items()
}
"""Names of :func:`cause_of` that are right, by kind of fault."""


def blames_attention(issues: Sequence[StabilityIssue]) -> bool:
    """Return whether any of the issues says that attention is at fault."""
    return any(
        issue.issue_type in OF_ATTENTION
        or (issue.issue_type == "update_spike" and issue.layer is not None)
        or (issue.issue_type == "non_finite" and "score" in str(issue.evidence))
        for issue in issues
    )


def cause_of(issue: StabilityIssue, groups: Sequence[str] = ()) -> str:
    """Return the cause that an issue names, in one word; ``growth`` and ``loss`` name none.

    Args:
        issue: the first alarm of a step.
        groups: parts of the model in the optimizer's groups, in order; empty where unknown.
    """
    kind, evidence = issue.issue_type, issue.evidence
    if kind == "update_spike":
        return _of_rates(issue, groups)
    if kind in OF_ATTENTION and "by" in evidence:
        return str(evidence["by"])
    if evidence.get("from_the_start"):
        return "start"
    if kind == "logit_growth":
        return "jump" if evidence.get("how") == "jump" else "growth"
    if kind in ("overflow_risk", "precision_insufficient"):
        return "exp_softmax" if "exp_dtype" in evidence else "format"
    if kind == "weight_jump":
        return part_of(issue.layer or "")
    if kind == "non_finite":
        return _of_non_finite(issue)
    if kind == "loss_spike" and evidence.get("cause"):
        return str(evidence["cause"])
    return "growth" if kind in OF_ATTENTION else "loss"


def part_of(name: str) -> str:
    """Return the part of a small model that a module is in, by its name."""
    parts = {"attn": "weights", "emb": "embedding", "pos": "embedding", "head": "head"}
    words = {"mlp": "mlp", ".up": "mlp", ".down": "mlp"}
    return next((part for word, part in (parts | words).items() if word in name), "weights")


def _of_rates(issue: StabilityIssue, groups: Sequence[str]) -> str:
    evidence = issue.evidence
    if issue.layer is not None or evidence.get("how") == "ahead":
        return "query_key"
    if evidence.get("how") == "decay":
        return "weight_decay"
    named = evidence.get("fitting_rates") or evidence.get("highest_rates_before") or {}
    if len(named) in (0, len(evidence.get("rates") or named)) or not groups:
        return "rate"
    parts = {groups[int(key.rpartition(".")[2])] for key in named}
    return parts.pop() if len(parts) == 1 else "rate"


def _of_non_finite(issue: StabilityIssue) -> str:
    evidence, layer = issue.evidence, issue.layer or ""
    if evidence.get("kind") == "score":
        return "format"
    if evidence.get("cause") == "overflow":
        return "format" if "attn" in layer else part_of(layer)
    return part_of(layer) if evidence.get("kind") == "parameter" else str(evidence.get("kind"))
