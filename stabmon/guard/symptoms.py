"""Which kind of act repairs which kind of issue, and in which order acts are tried."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from stabmon.projections.norm_gains import RMS_NORM
from stabmon.records import StabilityIssue

Family = Literal["non_finite", "rate", "drive", "scores", "step", "loss"]
Key = tuple[Family, str | None, int | None]

FAMILIES: Mapping[str, Family] = {
    "non_finite": "non_finite",
    "update_spike": "rate",
    "logit_growth": "scores",
    "entropy_collapse": "scores",
    "overflow_risk": "scores",
    "precision_insufficient": "scores",
    "high_curvature": "scores",
    "attention_spike": "scores",
    "gradient_vanishing": "scores",
    "gradient_explosion": "loss",
    "loss_spike": "loss",
}
"""Issues that the same acts repair. Families are treated in the order of :data:`ORDER`: what is not
finite first, then a rate that jumped; then what drives a layer, then scores, of which the cause is
known by its head, and beside them steps of a layer's queries and keys alone; then what is seen in
the loss alone. Where the rate jumped all weights have moved: then the loss comes before the scores,
and is gone back from."""

ORDER: Mapping[Family, tuple[str, ...]] = {
    "non_finite": ("rollback", "stop"),
    "rate": ("cap_learning_rate", "lower_learning_rate"),
    "drive": ("cap_query_key_norm", "cap_scale", "qk_clip", "soften_logits", "lower_learning_rate"),
    "scores": ("qk_clip", "soften_logits", "logit_softcap", "lower_learning_rate"),
    "step": ("cap_query_key_update", "lower_learning_rate"),
    "loss": ("rollback", "lower_learning_rate"),
}
"""From what repairs most at the least cost to a healthy run. On ten small runs that failed from
attention: qk_clip closed the gap in 7 and cost nothing, temperature in 6 at 0.01 nats, softcap in
1; a tenth of the rate for queries and keys helped where the rate itself was the cause, at 0.08."""

PREVENTIVE = ("extend_warmup", "entropy_regularization", "increase_dropout")
"""No cures: last in every family, and only where the configuration names them."""

ADVICE: Mapping[Family, str] = {
    "rate": "look at the schedule and the parameter groups around the step, and start from a "
    "checkpoint before it",
    "step": "look at the rate of the parameter group that queries and keys are in",
    "drive": "look for what multiplies the layer's W_q and W_k, or the scale of its scores",
    "scores": f"change the architecture so that scores cannot grow: {RMS_NORM}",
    "non_finite": "find the first bad tensor in issues.jsonl (evidence.first_bad), mend it, and "
    "start from a checkpoint before it",
    "loss": "look at the batches around the spike, and start from a checkpoint before it with a "
    "lower rate or tighter clipping",
}


def key_of(issue: StabilityIssue) -> Key:
    """What an act's success is judged by: kind of issue and place; the run as a whole where it is
    not about attention.
    """
    family = family_of(issue)
    return (
        (family, issue.layer, issue.head)
        if family in ("drive", "scores", "step")
        else (family, None, None)
    )


def family_of(issue: StabilityIssue) -> Family:
    """What kind of act repairs an issue of :data:`FAMILIES`."""
    if issue.issue_type == "logit_growth" and issue.head is None:
        return "drive"
    return (
        "step"
        if issue.issue_type == "update_spike" and issue.layer is not None
        else FAMILIES[issue.issue_type]
    )


def in_order(families: Collection[Family]) -> list[Family]:
    """Those of :data:`ORDER` in the order in which they are treated: see :data:`FAMILIES`."""
    order: list[Family] = (
        ["non_finite", "rate", "loss", "drive", "scores", "step"]
        if "rate" in families
        else list(ORDER)
    )
    return [family for family in order if family in families]
