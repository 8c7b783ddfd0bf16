"""Records of one attention call, one sampled step's reading, and one issue.

Records are frozen. ``AttentionCall`` holds live tensors and dies with the forward that made it; all
the others hold NumPy arrays and plain values only, and can be stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Severity = Literal["info", "warning", "error", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error", "critical")
"""From least to most severe. ``error`` and above is an alarm."""

IssueState = Literal["opened", "worsened", "closed"]


def is_alarm(severity: Severity) -> bool:
    """Whether ``severity`` claims that training is being harmed, or will be unless somebody
    acts.
    """
    return SEVERITIES.index(severity) >= SEVERITIES.index("error")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call of a model's own forward, just as the kernel was given it.

    B batch, H query heads, H_kv key heads (H is a multiple of H_kv), Q queries, K keys, D head
    dimension.
    """

    layer: str
    """Qualified name of the module that attends, without wrapper prefixes; ``name#1``… from its
    second call on.
    """
    query: Tensor | None
    """``[B, H, Q, D]``, after RoPE and query/key normalisation; None where only ``scores`` were
    seen.
    """
    key: Tensor | None
    """``[B, H_kv, K, D]``, before grouped heads are expanded; None where only ``scores`` were
    seen.
    """
    scale: float
    """The inverse temperature: scores are ``scale * query @ key.T``."""
    is_causal: bool = False
    """Query i sees keys 0 … i + K - Q (aligned at the bottom right)."""
    mask: Tensor | None = None
    """Bool (True is visible) or additive float (-inf, or the dtype's minimum, hides), broadcasts to
    ``[B, H, Q, K]``.
    """
    window: int | None = None
    """A query sees at most its ``window`` newest visible keys (itself included); None for all."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)`` before mask and bias are added."""
    sinks: Tensor | None = None
    """``[H]`` learned sink logits that join each row's softmax but no value (GPT-OSS); ``[B, H,
    Q]`` where they depend on the query.
    """
    scores: Tensor | None = None
    """``[B, H, Q, K]`` scores that the model itself formed, hidden keys at -inf: only where it
    hands over no query and key.
    """
    dtype: torch.dtype = torch.float32
    """The dtype in which the model's own kernel multiplies query and key."""
    fused: bool = True
    """Whether the model's kernel accumulates scores in float32 (fused), or rounds them to ``dtype``
    (eager, hand-written).
    """
    module: nn.Module | None = None
    """The module that attends."""
    is_self: bool = False
    """Query i is known to be of the same token as key i + K - Q, so that a hidden key tells of a
    query that is padding.
    """


@dataclass(frozen=True)
class LayerInfo:
    """What a rule must know of a layer besides its signals."""

    heads: int
    head_dim: int
    scale: float
    dtype: str
    """The kernel's dtype, ``float16``, ``bfloat16``, ``float32`` …"""
    fused: bool = True
    """See :class:`AttentionCall`."""
    softcap: float | None = None
    adapted: bool = False
    """W_q or W_k is frozen, as under adapters (LoRA, DoRA …) and prompts: what is trained is around
    them, and no clip reaches them.
    """


@dataclass(frozen=True, eq=False)
class Reading:
    """All that was measured at one sampled step."""

    step: int
    """The optimizer step, counted from 1."""
    loss: float | None
    layers: Mapping[str, Mapping[str, np.ndarray]]
    """``layers[layer][signal]`` is float64 ``[H]``, one value a query head; NaN where no row
    counted.
    """
    info: Mapping[str, LayerInfo] = field(default_factory=dict)
    learning_rate: float | None = None
    """The largest rate over the parameter groups of all optimizers at this step, as scheduled."""
    gradients: Mapping[str, float] = field(default_factory=dict)
    """L2 norm of the gradient of each attention module's own parameters, by layer, and of all
    parameters under ``""``.
    """
    query_key: Mapping[str, QKUpdate] = field(default_factory=dict)
    """How W_q and W_k moved, by layer, where they can be told apart."""
    losses: tuple[tuple[int, float], ...] = ()
    """(step, loss) of every step since the last reading, this one included, where the losses are
    known.
    """
    micro_batches: int = 1
    """How many forwards this reading is reduced over."""
    non_finite: NonFinite | None = None
    """Where a NaN or inf first came up, if one did since the last reading."""
    overhead_fraction: float | None = None
    """Share of wall time spent inside stabmon since the last reading."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """The scheduled rate of each parameter group at this step, by ``<optimizer>.<group>`` (both
    counted from 0).
    """
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """The share of its scheduled rate that a group used, where interventions changed it; 1 for
    groups that are not here.
    """
    overshoot: Overshoot | None = None
    """What showed that steps are too long, if something did since the last reading."""
    sampled: bool = True
    """Whether this is a sampled step; else one at which something was found between samples, of
    which only that is known.
    """
    updates: Mapping[str, float] = field(default_factory=dict)
    """The share of itself by which the step moved each group's parameters, ``||dp|| / ||p||``;
    measured on a sample of large groups.
    """

    @property
    def used_rates(self) -> dict[str, float]:
        """The rate that each parameter group was stepped with: the scheduled one times what
        interventions made of it.
        """
        return {
            key: rate * self.rate_factors.get(key, 1.0) for key, rate in self.learning_rates.items()
        }

    def __repr__(self) -> str:
        loss = "unknown" if self.loss is None else f"{self.loss:.4g}"
        heads = sum(head_count(signals) for signals in self.layers.values())
        bad = "" if self.non_finite is None else f", non-finite {self.non_finite.kind}"
        return (
            f"Reading(step={self.step}, loss={loss}, {counted(len(self.layers), 'layer')}, "
            f"{counted(heads, 'head')}{bad})"
        )


@dataclass(frozen=True)
class QKUpdate:
    """L2 norms over everything that makes the queries and keys of a layer, at one optimizer
    step.
    """

    gradient: float
    """As the optimizer met it; NaN under a gradient scaler."""
    weight: float
    """Before the step."""
    update: float
    """Of what the step changed."""

    @property
    def share(self) -> float:
        """What the step changed, over what was there; NaN where that was zero."""
        return self.update / self.weight if self.weight > 0 else float("nan")


Cause = Literal[
    "", "mask", "overflow", "labels", "objective", "data", "weights", "optimizer", "arithmetic"
]
"""What made a NaN or an inf: a row that sees no key; a value beyond its number format; no target
that counts; the loss function; the batch; a parameter; the optimizer's step on finite gradients; a
module that makes it of finite values. Empty where unknown."""


@dataclass(frozen=True)
class Overshoot:
    """Steps are too long: what shows it, and which rate would fit."""

    step: int
    how: Literal["first_step", "brisk", "steps", "torn", "leap"]
    """The first step (``brisk``: a little too long, which is no alarm unless heads break), or the
    median of several in a row, gained too little on its own batch; a step tore the loss of its own
    batch up; or the loss leapt at a step that was not probed."""
    gain_ratio: float
    """Actual over predicted decrease of the batch's own objective: 1 for a small step, 1/2 at the
    minimum of a quadratic along the step, 0 where nothing was gained, below where it rose. NaN
    where only the loss shows it."""
    rise: float
    """Share by which the objective of the step's own batch rose, or the loss above the largest
    before.
    """
    rates: Mapping[str, float] = field(default_factory=dict)
    """The rate used, by parameter group."""
    fitting: Mapping[str, float] = field(default_factory=dict)
    """The rate that fits, of the groups whose steps are too long."""

    @property
    def rate(self) -> float:
        """The largest rate of the groups whose steps are too long."""
        return max(
            (self.rates[key] for key in self.fitting if key in self.rates), default=float("nan")
        )

    @property
    def fitting_rate(self) -> float:
        """The largest rate that fits one of them."""
        return max(self.fitting.values(), default=float("nan"))


@dataclass(frozen=True)
class NonFinite:
    """The first tensor of a step that held a NaN or an inf, found by replaying the step's batch."""

    step: int
    kind: Literal["parameter", "input", "activation", "score", "gradient", "loss"]
    layer: str | None
    """Qualified name of the first bad module."""
    head: int | None
    tensor: str
    """What is bad in it, as ``q_proj.weight``, ``output``, ``query``, ``score``."""
    detail: str = ""
    cause: Cause = ""
    touched: Literal["", "nothing", "gradients", "weights"] = ""
    """How far it has come: ``nothing`` but the loss, ``gradients`` of a step that was left out,
    ``weights``; empty where unknown.
    """
    skipped: int = 0
    """Steps in a row that were left out because of it, where they are more than a gradient scaler's
    search takes.
    """
    search: int = 0
    """Steps in a row that a search may take."""
    scale: float | None = None
    """What a gradient scaler multiplies the loss by at present; None without one."""


@dataclass(frozen=True)
class StabilityIssue:
    """One thing that is, or is about to go, wrong with attention or with training."""

    step: int
    layer: str | None
    """Qualified name of the module at fault; None where the whole run is meant."""
    head: int | None
    """The query head; None where the whole layer, or the run, is meant."""
    issue_type: str
    severity: Severity
    value: float
    threshold: float
    suggestion: str
    """What to do about it, and why."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Plain values (numbers, strings, lists of them) on which the claim rests."""
    eta_steps: float | None = None
    """For a forecast: optimizer steps left until harm; None where none is made."""
    state: IssueState = "opened"
    """An issue is emitted when it opens, when it worsens and when it closes (then with severity
    ``info``).
    """

    def __repr__(self) -> str:
        head = "" if self.head is None else f" head {self.head}"
        state = "" if self.state == "opened" else f", {self.state}"
        numbers = f"value {self.value:.4g}, threshold {self.threshold:.4g}"
        return (
            f"StabilityIssue({self.severity} {self.issue_type}, {self.layer or 'run'}{head}, "
            f"step {self.step}, {numbers}{state})"
        )

    @property
    def key(self) -> tuple[str, str | None, int | None]:
        """What an issue is about: (issue_type, layer, head)."""
        return (self.issue_type, self.layer, self.head)

    @property
    def is_alarm(self) -> bool:
        """Whether the severity is ``error`` or ``critical``."""
        return is_alarm(self.severity)

    @property
    def where(self) -> str:
        """The place in words: ``model.layers.3.self_attn head 5``, a layer alone, or ``run``."""
        if self.layer is None:
            return "run"
        return self.layer if self.head is None else f"{self.layer} head {self.head}"

    def to_dict(self) -> dict[str, Any]:
        """The issue as plain values, one entry a field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return values | {"evidence": dict(self.evidence)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StabilityIssue:
        """The issue that :meth:`to_dict` wrote; entries that are no field are ignored."""
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


def head_count(signals: Mapping[str, np.ndarray]) -> int:
    """Return the number of heads that a layer's values are of."""
    return max((np.size(values) for values in signals.values()), default=0)


def counted(number: int, noun: str) -> str:
    """Return a count and its noun: ``1 head``, ``2 heads``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
