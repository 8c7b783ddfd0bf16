"""Advise how a KV cache may be compressed, each way measured on the model's own loss.

The batch is run teacher-forced while every query sees only the keys that a compressed cache would
hold. The cost is the rise of the loss, in nats a token, over the tokens whose queries see more
keys than are kept; the others lose nothing and would only dilute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stabmon.analysis.call_facts import reads_other_sequence, token_ids
from stabmon.analysis.compression.key_choices import (
    SINKS,
    AllKeys,
    DiverseKeys,
    GroupedKeys,
    KeyChoice,
    RandomKeys,
    RecentKeys,
    TopKeys,
)
from stabmon.analysis.compression.restricted_attention import restricted_attention
from stabmon.analysis.forward import call_arguments, run_model, undisturbed
from stabmon.analysis.patterns.layer_scan import is_causal_call
from stabmon.analysis.rollout.stacks import CallReader
from stabmon.capture.intercept import AttentionSite, intercepted
from stabmon.capture.protocol import isolated
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall

TOLERANCE = 0.01
"""Rise of the loss in nats up to which a compression is advised."""
SHARES = (16, 8, 4, 2)
"""The context is divided by these for the numbers of keys that are tried, least first."""
ERRORS = 2
"""Standard errors that must fit under the tolerance too."""
LEAST_KEEP = 8
LEAST_TOKENS = 32
"""Tokens that a compression must touch, below which nothing is advised."""
SIMPLER = "and are simpler to keep"
FAITHFUL = 1e-3
"""Difference in loss, in nats, up to which our attention with all keys is the model's own."""

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Recommendation:
    """One way to compress the cache, with what it costs; losses in nats.

    Attributes:
        policy: ``keep_recent``, ``keep_recent_and_sinks`` (the first 4 and the newest),
            ``top_k`` (the largest weights of each query), ``diverse`` (the newest half, and the
            older keys least like their mean) or ``grouping`` (older neighbours merged).
        keep: keys kept a query and head.
        context: keys that the longest query sees.
        loss, full_loss: mean loss of the touched tokens with and without the compression.
        cost: ``loss - full_loss``.
        standard_error: of the cost, over tokens taken as independent.
        by_sample: cost of each sample; NaN where none of its tokens is touched.
        n: tokens that are touched.
        recency_cost, random_cost: cost of as many newest and as many random keys.
        text: the advice, or the refusal, in words.
        reason: why it is not advised; empty where it is.
        options: further numbers, such as ``sinks`` or ``group_size``.
    """

    policy: str
    keep: int
    context: int
    loss: float
    full_loss: float
    cost: float
    standard_error: float
    by_sample: list[float]
    n: int
    recency_cost: float
    random_cost: float
    text: str
    reason: str = ""
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CompressionAdvice:
    """Hold recommendations, rejected candidates and notes."""

    recommendations: list[Recommendation] = field(default_factory=list)
    rejected: list[Recommendation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Cost:
    loss: float
    full: float
    error: float
    by_sample: list[float]
    n: int

    @property
    def rise(self) -> float:
        return self.loss - self.full


class _Refusal(Exception):
    """Why there is no advice."""


def compression_advice(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFunction | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> CompressionAdvice:
    """Measure ways of compressing the cache and advise those that cost next to nothing.

    Tried are, for a sixteenth, an eighth, a quarter and half of the longest context, the newest
    keys, the newest with the first four, the largest weights, a diverse choice, and merged
    neighbours, in all self-attention layers that see the whole context (sliding layers hold few
    keys anyway and are left out). Of each way the smallest number of keys that costs at most
    ``tolerance``, with two standard errors, is advised, unless the newest keys alone do as well.
    Up to 25 forwards.

    Args:
        model: a causal language model whose attention goes through transformers' interface or
            ``scaled_dot_product_attention``.
        batch: what its forward takes.
        loss_fn: (output, batch) -> losses in nats, ``[B, S]`` (of the prediction that query i
            makes) or ``[B]``; None for the cross-entropy of the next token in ``input_ids``.
        tolerance: largest rise of the loss that is advised, in nats.
        seed: of the random keys; the global random state is left alone.

    Returns:
        The advice; empty with a note where the model has no such loss or cannot be rewritten.

    Example:
        >>> compression_advice(nn.TransformerEncoderLayer(8, 2), torch.randn(2, 3, 8)).notes
        ['no compression advice: the batch has no token ids, so there is no next-token loss']
    """
    try:
        trial = _Trial(model, batch, loss_fn, seed)
    except _Refusal as refusal:
        return CompressionAdvice(notes=[f"no compression advice: {refusal}"])
    advice = CompressionAdvice()
    if trial.left_out:
        advice.notes.append(
            f"compression advice leaves {len(trial.left_out)} of {trial.layers} attention layers "
            f"as they are, which see part of the context only: {', '.join(trial.left_out[:3])}"
        )
    sizes = sorted({max(LEAST_KEEP, trial.context // share) for share in SHARES})
    for policy in ("keep_recent", "keep_recent_and_sinks", "top_k", "diverse", "grouping"):
        for keep in (size for size in sizes if size < trial.context):
            result = _tried(trial, policy, keep, tolerance)
            (advice.rejected if result.reason else advice.recommendations).append(result)
            if not result.reason or result.reason.endswith(SIMPLER):
                break
    return advice


def _tried(trial: _Trial, policy: str, keep: int, tolerance: float) -> Recommendation:
    choice, options = _choice(policy, keep, trial.context)
    recent = trial.cost("keep_recent", keep, RecentKeys(keep))
    chance = trial.cost("random", keep, RandomKeys(keep, trial.seed))
    cost = trial.cost(policy, keep, choice)
    reason = ""
    if cost.n < LEAST_TOKENS:
        reason = f"only {cost.n} tokens see more than {keep} keys, too few to tell"
    elif not cost.rise <= tolerance:
        reason = f"it costs {cost.rise:.3g} nats a token, more than {tolerance:g}"
    elif not cost.rise + ERRORS * cost.error <= tolerance:
        reason = f"its cost may be {cost.rise + ERRORS * cost.error:.3g} nats, give more text"
    elif policy != "keep_recent" and recent.rise <= max(cost.rise, tolerance / 2):
        reason = f"as many newest keys cost {recent.rise:.3g} nats, {SIMPLER}"
    words = {
        "keep_recent": f"keep the {keep} newest keys",
        "keep_recent_and_sinks": f"keep the first {SINKS} and the {keep - SINKS} newest keys",
        "top_k": f"read the {keep} keys with the largest weights of each query",
        "diverse": f"keep the {keep - keep // 2} newest keys and the {keep // 2} older ones least "
        "like their mean",
        "grouping": f"keep the {keep // 2} newest keys and merge older neighbours by "
        f"{options.get('group_size', 0)}",
    }[policy]
    measured = (
        f"{cost.rise:+.4f} ± {cost.error:.4f} nats a token over {cost.n} tokens of "
        f"{len(cost.by_sample)} sample{'s' * (len(cost.by_sample) != 1)} (newest keys "
        f"{recent.rise:+.4f}, random keys {chance.rise:+.4f})"
    )
    words = f"{words}, of a context of {trial.context}"
    text = f"{words[0].upper()}{words[1:]}: {measured}."
    if reason:
        text = f"Do not {words}: {reason}; measured {measured}."
    elif chance.rise <= tolerance:
        text += " Random keys do as well: this text hardly needs its context."
    return Recommendation(
        policy,
        keep,
        trial.context,
        cost.loss,
        cost.full,
        cost.rise,
        cost.error,
        cost.by_sample,
        cost.n,
        recent.rise,
        chance.rise,
        text,
        reason,
        options,
    )


def _choice(policy: str, keep: int, context: int) -> tuple[KeyChoice, dict[str, int]]:
    if policy == "keep_recent":
        return RecentKeys(keep), {}
    if policy == "keep_recent_and_sinks":
        return RecentKeys(keep, SINKS), {"sinks": SINKS}
    if policy == "top_k":
        return TopKeys(keep), {}
    if policy == "diverse":
        return DiverseKeys(keep), {}
    single = keep // 2
    size = max(2, math.ceil((context - single) / max(1, keep - single - 1)))
    return GroupedKeys(keep, size), {"group_size": size}


class _Trial:
    """A batch whose loss can be measured under any choice of keys.

    Raises:
        _Refusal: where it cannot.
    """

    def __init__(
        self, model: nn.Module, batch: Any, loss_fn: LossFunction | None, seed: int
    ) -> None:
        self.model, self.batch, self.seed = model, batch, seed
        ids, decoder = token_ids(model, batch)
        if ids is None and loss_fn is None:
            raise _Refusal("the batch has no token ids, so there is no next-token loss")
        if decoder is not None:
            raise _Refusal("the model has an encoder and a decoder")
        self._ids, self._loss_fn = ids, loss_fn
        self._known: dict[tuple[str, int], _Cost] = {}
        seen = self._look()
        self.context = max(int(n.max()) for n in seen.values())
        if self.context < 2 * LEAST_KEEP:
            raise _Refusal(f"no query sees more than {self.context} keys; give a longer text")
        self.left_out = [name for name, n in seen.items() if int(n.max()) < self.context]
        self.layers = len(seen)
        self._seen = max(seen.values(), key=lambda n: int(n.max()))
        plain = self._losses(None)
        self._full = self._losses(AllKeys())
        gap = float((self._full - plain).nanmean().abs())
        if not gap <= FAITHFUL:
            raise _Refusal(f"attention rebuilt with all keys changes the loss by {gap:.2g} nats")

    def cost(self, name: str, keep: int, choice: KeyChoice) -> _Cost:
        """Measure one choice, or return what was measured before."""
        if (name, keep) not in self._known:
            self._known[name, keep] = self._measure(keep, choice)
        return self._known[name, keep]

    def _measure(self, keep: int, choice: KeyChoice) -> _Cost:
        losses, full = self._losses(choice), self._full
        touched = ~full.isnan()
        if losses.dim() == 2:
            touched &= (self._seen > keep)[:, : losses.shape[1]]
        rise = (losses - full).double()
        by_sample = [
            float(r[t].mean()) if bool(t.any()) else math.nan
            for r, t in zip(rise, touched, strict=True)
        ]
        n = int(touched.sum())
        if n == 0:
            return _Cost(math.nan, math.nan, math.nan, by_sample, 0)
        error = float(rise[touched].std(unbiased=True) / n**0.5) if n > 1 else math.nan
        mean, mean_full = losses[touched].double().mean(), full[touched].double().mean()
        return _Cost(float(mean), float(mean_full), error, by_sample, n)

    def _look(self) -> dict[str, Tensor]:
        """Return how many keys each query sees, by layer, ``[B, Q]``."""
        seen: dict[str, Tensor] = {}
        reader = CallReader(self.model)

        def look(call: AttentionCall) -> None:
            attention = operator_of(call)
            if reads_other_sequence(call, reader):
                raise _Refusal(f"{call.layer} attends to another sequence")
            if not is_causal_call(attention) and attention.queries > 1:
                raise _Refusal(f"the model is not causal: in {call.layer} queries see later keys")
            count = torch.where(attention.is_counted, attention.n_visible(), 0).amax(1)
            seen[call.layer] = count.cpu()

        run_model(self.model, self.batch, look)
        met: set[str] = set()

        def meet(site: AttentionSite) -> Any:
            met.add(site.layer)
            return site.run()

        with self._running(meet) as run:
            run()
        if missing := [name for name in seen if name not in met]:
            raise _Refusal(f"{missing[0]} computes its attention by hand, and is not rewritten")
        return seen

    @contextmanager
    def _running(self, around: Callable[[AttentionSite], Any]) -> Iterator[Callable[[], Any]]:
        arguments, keywords = call_arguments(self.model, self.batch)
        with undisturbed(self.model), torch.no_grad(), intercepted(self.model, around):
            yield lambda: self.model(*arguments, **keywords)

    def _losses(self, choice: KeyChoice | None) -> Tensor:
        """Return losses in nats, ``[B, S - 1]`` on the CPU (``[B]`` from some loss functions)."""
        left_out = set(getattr(self, "left_out", ()))

        def around(site: AttentionSite) -> Any:
            if choice is None or site.layer in left_out:
                return site.run()
            value = site.arguments["value"]
            with isolated():
                attention = operator_of(site.read())
                output = restricted_attention(attention, value, choice)
            return site.result(output.to(value.dtype))

        with self._running(around) as run:
            output = run()
        return self._loss_of(output).detach().cpu()

    def _loss_of(self, output: Any) -> Tensor:
        if self._loss_fn is not None:
            losses = self._loss_fn(output, self.batch)
            if not isinstance(losses, Tensor) or losses.dim() not in (1, 2):
                raise ValueError("loss_fn must return a tensor of losses [B, S] or [B], in nats")
            return losses
        assert self._ids is not None
        logits = _logits(output)
        ids = self._ids.to(logits.device) if logits is not None else self._ids
        if logits is None or logits.shape[:2] != ids.shape or logits.shape[2] <= int(ids.max()):
            raise _Refusal(
                "the model gives no logits of the next token at every position; give it with its "
                "language-model head, or a loss_fn"
            )
        targets = ids[:, 1:].clone()
        keywords = self.batch if isinstance(self.batch, Mapping) else {}
        labels, mask = keywords.get("labels"), keywords.get("attention_mask")
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            targets = labels[:, 1:].to(ids.device)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            kept = mask.to(ids.device).bool()
            targets = targets.masked_fill(~(kept[:, 1:] & kept[:, :-1]), -100)
        losses = torch.stack(
            [
                functional.cross_entropy(one[:-1].float(), target, reduction="none")
                for one, target in zip(logits, targets, strict=True)
            ]
        )
        return losses.masked_fill(targets == -100, torch.nan)


def _logits(output: Any) -> Tensor | None:
    """Return the logits ``[B, S, V]`` in what a language model returns."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and not isinstance(output, Mapping):
        parts = output if isinstance(output, tuple | list) else (output,)
        found = next((x for x in parts if isinstance(x, Tensor) and x.dim() == 3), None)
    return found if isinstance(found, Tensor) and found.dim() == 3 else None
