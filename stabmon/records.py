"""Records that flow through stabmon: calls, readings, findings and issues.

Records are frozen. ``AttentionCall`` holds live tensors and dies with the forward that made it; all
the others hold NumPy arrays and plain values only, and can be stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from stabmon._display.html import card, line
from stabmon._storage.plain_record import PlainRecord

Severity = Literal["info", "warning", "error", "critical"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error", "critical")
"""From least to most severe. ``error`` and above is an alarm."""

IssueState = Literal["opened", "worsened", "closed"]


def is_alarm(severity: Severity) -> bool:
    """Return whether a severity claims damage to training, present or expected."""
    return SEVERITIES.index(severity) >= SEVERITIES.index("error")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One attention call of a model's own forward, with its kernel's inputs.

    B batch, H query heads, H_kv key heads (H is a multiple of H_kv), Q queries, K keys, D head
    dimension.
    """

    layer: str
    """Qualified name of the attention module, without wrapper prefixes.

    ``name#1``, ``name#2`` … from the module's second call of a forward on.
    """
    query: Tensor | None
    """``[B, H, Q, D]``, after RoPE and query/key normalisation; None beside ``scores``."""
    key: Tensor | None
    """``[B, H_kv, K, D]``, before grouped heads are expanded; None beside ``scores``."""
    scale: float
    """Inverse temperature: scores are ``scale * query @ key.T``."""
    is_causal: bool = False
    """Query i sees keys 0 … i + K - Q (aligned at the bottom right)."""
    mask: Tensor | None = None
    """Bool (True is visible) or additive float mask that broadcasts to ``[B, H, Q, K]``.

    In a float mask, -inf or the dtype's minimum hides.
    """
    window: int | None = None
    """A query sees at most its ``window`` newest visible keys (itself included); None for all."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)`` before mask and bias are added."""
    sinks: Tensor | None = None
    """``[H]`` learned sink logits that join each row's softmax but no value (GPT-OSS).

    ``[B, H, Q]`` where they depend on the query.
    """
    scores: Tensor | None = None
    """``[B, H, Q, K]`` scores that the model formed itself, hidden keys at -inf.

    Given only where query and key are not.
    """
    dtype: torch.dtype = torch.float32
    """The dtype in which the model's own kernel multiplies query and key."""
    fused: bool = True
    """The model's kernel accumulates scores in float32.

    Otherwise (eager, hand-written) it rounds them to ``dtype``.
    """
    module: nn.Module | None = None
    """The module that attends."""
    is_self: bool = False
    """Query i is known to be of the same token as key i + K - Q.

    A hidden key then shows that its query is padding.
    """
    exp_range: Tensor | None = None
    """``[B, H, Q]`` share of the range of exp that the model's own exponentials of a row use.

    1 where they or their sum are at the end of their format. None where a softmax is taken, which
    subtracts the row's maximum.
    """
    exp_dtype: torch.dtype | None = None
    """The dtype of these exponentials."""


@dataclass(frozen=True)
class LayerInfo(PlainRecord):
    """Facts about a layer that rules need besides its signals."""

    heads: int
    head_dim: int
    scale: float
    dtype: str
    """The kernel's dtype, ``float16``, ``bfloat16``, ``float32`` …"""
    fused: bool = True
    """See :class:`AttentionCall`."""
    softcap: float | None = None
    adapted: bool = False
    """W_q or W_k is frozen, as under adapters (LoRA, DoRA …) and prompts.

    The trained parameters lie around them, and no clip reaches them.
    """
    exp_dtype: str | None = None
    """The format of exponentials that the model writes by hand; None where it takes a softmax."""


@dataclass(frozen=True, eq=False)
class Reading(PlainRecord):
    """All measurements of one sampled step."""

    step: int
    """The optimizer step, counted from 1."""
    loss: float | None
    layers: Mapping[str, Mapping[str, np.ndarray]]
    """``layers[layer][signal]`` is float64 ``[H]``, one value per query head.

    NaN where no row counted.
    """
    info: Mapping[str, LayerInfo] = field(default_factory=dict)
    learning_rate: float | None = None
    """The largest scheduled rate over the parameter groups of all optimizers at this step."""
    gradients: Mapping[str, float] = field(default_factory=dict)
    """L2 norm of the gradient of each attention module's own parameters, by layer.

    The norm over all parameters is under ``""``.
    """
    query_key: Mapping[str, QKUpdate] = field(default_factory=dict)
    """Updates of W_q and W_k by layer, where the two can be located."""
    losses: tuple[tuple[int, float], ...] = ()
    """(step, loss) of every step since the last reading whose loss is known, this one included."""
    micro_batches: int = 1
    """Number of forwards that this reading is reduced over."""
    non_finite: NonFinite | None = None
    """Origin of a NaN or inf that came up since the last reading."""
    overhead_fraction: float | None = None
    """Share of wall time spent inside stabmon since the last reading."""
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """Scheduled rate of each parameter group at this step.

    Keys are ``<optimizer>.<group>``, both counted from 0.
    """
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    """Share of its scheduled rate that a group used, where interventions changed it.

    1 for groups that are not here.
    """
    overshoot: Overshoot | None = None
    """Finding since the last reading that steps are too long."""
    sampled: bool = True
    """This is a sampled step.

    Otherwise something was found between samples, and only that is known of the step.
    """
    risk: Mapping[str, float] = field(default_factory=dict)
    """Chance of each layer that its attention damages the run from here on, in [0, 1]."""
    updates: Mapping[str, float] = field(default_factory=dict)
    """Relative update of each group's parameters by the step, ``||dp|| / ||p||``.

    Measured on a sample of large groups.
    """
    weight_decays: Mapping[str, float] = field(default_factory=dict)
    """Weight decay that each group used in the step, where it takes a share of the weights."""
    parts: Mapping[str, PartChange] = field(default_factory=dict)
    """Weights of each part of the model: attention layers, modules beside them, and others."""
    query_key_groups: tuple[str, ...] = ()
    """Keys of the parameter groups that W_q and W_k are in, where the two can be located."""
    rank_losses: tuple[tuple[int, float, int], ...] = ()
    """(step, largest loss of a rank, that rank) of the newest steps, where there are several ranks.

    The losses themselves are means over ranks.
    """

    @property
    def used_rates(self) -> dict[str, float]:
        """Rate of each parameter group in the step: the scheduled one after interventions."""
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
class QKUpdate(PlainRecord):
    """L2 norms over a layer's query and key parameters, at one optimizer step."""

    gradient: float
    """As the optimizer met it; NaN under a gradient scaler."""
    weight: float
    """Before the step."""
    update: float
    """Of the change that the step made."""

    @property
    def relative_update(self) -> float:
        """Update over weight; NaN where the weight is zero."""
        return self.update / self.weight if self.weight > 0 else float("nan")


@dataclass(frozen=True)
class PartChange(PlainRecord):
    """L2 norms over the weights of one part of the model, at a sampled step."""

    weight: float
    """Before the step."""
    before: float
    """After the sampled step before; NaN where it is not known."""
    update: float
    """Relative update by the step, ``||dW|| / ||W||``, on a sample; NaN where it is not known."""


Cause = Literal[
    "", "mask", "overflow", "labels", "objective", "data", "weights", "optimizer", "arithmetic"
]
"""Cause of a NaN or an inf; empty where unknown.

In their order: a row that sees no key; a value beyond its number format; no target that counts; the
loss function; the batch; a parameter; the optimizer's step on finite gradients; a module that makes
it of finite values.
"""


@dataclass(frozen=True)
class Overshoot(PlainRecord):
    """Finding that steps are too long, and the rates that would fit."""

    step: int
    how: Literal["first_step", "brisk", "steps", "torn", "leap", "jump", "decay"]
    """Evidence of the finding.

    - ``first_step``: the first step gained too little on its own batch.
    - ``brisk``: the first step, or several in a row, gained too little by a small margin, which is
      no alarm unless heads break.
    - ``steps``: several steps in a row gained too little.
    - ``torn``: a step raised the loss of its own batch steeply.
    - ``leap``: the loss leapt at a step that was not probed.
    - ``decay``: a group's weight decay rose manifold in one step, to a share that does damage;
      ``rates`` and ``fitting`` are then decays, and ``updates`` the share taken in a step.
    - ``jump``: a group's rate rose manifold above its own past in one step, which moves it far.
    """
    gain_ratio: float
    """Actual over predicted decrease of the batch's own objective.

    1 for a small step, 1/2 at the minimum of a quadratic along the step, 0 where nothing was
    gained, negative where the objective rose. NaN where only the loss shows the overshoot.
    """
    rise: float
    """Relative rise of the objective on the step's own batch, or of the loss above its maximum."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """The rate used, by parameter group."""
    fitting: Mapping[str, float] = field(default_factory=dict)
    """The rate that fits, of the groups whose steps are too long.

    Of a jump the highest rate before it.
    """
    groups: Mapping[str, str] = field(default_factory=dict)
    """The groups that jumped in words: their name and the modules in them."""
    updates: Mapping[str, float] = field(default_factory=dict)
    """Relative update of the groups that jumped, by one step at their rate."""
    multiples: Mapping[str, float] = field(default_factory=dict)
    """Their rate over the median of the groups that did not jump, before the jump."""

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
class NonFinite(PlainRecord):
    """The first tensor of a step with a NaN or an inf, found by replaying its batch."""

    step: int
    kind: Literal["parameter", "input", "activation", "score", "gradient", "loss"]
    layer: str | None
    """Qualified name of the first bad module."""
    head: int | None
    tensor: str
    """The bad tensor in that module, as ``q_proj.weight``, ``output``, ``query``, ``score``."""
    detail: str = ""
    cause: Cause = ""
    touched: Literal["", "nothing", "gradients", "weights"] = ""
    """Extent of the damage; empty where unknown.

    ``nothing`` but the loss, ``gradients`` of a step that was left out, or ``weights``.
    """
    skipped: int = 0
    """Steps in a row that it made the run leave out.

    Counted where they are more than a gradient scaler's search takes.
    """
    search: int = 0
    """Steps in a row that a search may take."""
    scale: float | None = None
    """A gradient scaler's present factor on the loss; None without one."""


@dataclass(frozen=True)
class StabilityIssue(PlainRecord):
    """One problem of attention or of training, present or forecast."""

    step: int
    layer: str | None
    """Qualified name of the module at fault; None for the whole run."""
    head: int | None
    """The query head; None for the whole layer, or the run."""
    issue_type: str
    severity: Severity
    value: float
    threshold: float
    suggestion: str
    """Advice to the user, and its reason."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """Plain values (numbers, strings, lists of them) on which the claim rests."""
    eta_steps: float | None = None
    """For a forecast: optimizer steps left until damage; None where none is made."""
    state: IssueState = "opened"
    """An issue is emitted when it opens, when it worsens and when it closes.

    A closed issue has severity ``info``.
    """

    def __repr__(self) -> str:
        state = "" if self.state == "opened" else f", {self.state}"
        return (
            f"StabilityIssue({self.severity} {self.issue_type}, {self.where}, "
            f"step {self.step}, {self._numbers}{state})"
        )

    def _repr_html_(self) -> str:
        """Return place, numbers, forecast and advice, for notebooks."""
        eta = self.eta_steps
        return card(
            f"{self.severity}: {self.issue_type.replace('_', ' ')} in {self.where}",
            line(f"{self.state} at step {self.step}, {self._numbers}"),
            line("" if eta is None else f"damage is expected in about {eta:.0f} steps"),
            line(self.suggestion),
            severity=self.severity,
        )

    @property
    def _numbers(self) -> str:
        """Value and threshold; thresholds that no number reaches are left out."""
        bounded = np.isfinite(self.threshold) and abs(self.threshold) < 1e30
        limit = f", threshold {self.threshold:.4g}" if bounded else ""
        return f"value {self.value:.4g}{limit}"

    @property
    def letter(self) -> str:
        """First letter of the type, a capital for an alarm, for maps of heads."""
        first = self.issue_type[:1]
        return first.upper() if self.is_alarm else first.lower()

    @property
    def key(self) -> tuple[str, str | None, int | None]:
        """Identity of the issue over steps: (issue_type, layer, head)."""
        return (self.issue_type, self.layer, self.head)

    @property
    def is_alarm(self) -> bool:
        """True for severity ``error`` or ``critical``."""
        return is_alarm(self.severity)

    @property
    def where(self) -> str:
        """The location in words: ``h.3.attn head 5``, a layer alone, or ``run``."""
        if self.layer is None:
            return "run"
        return self.layer if self.head is None else f"{self.layer} head {self.head}"


def head_count(signals: Mapping[str, np.ndarray]) -> int:
    """Return the number of heads that a layer's values are of."""
    return max((np.size(values) for values in signals.values()), default=0)


def counted(number: int, noun: str) -> str:
    """Return a count and its noun: ``1 head``, ``2 heads``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
