"""A loss term on the attention entropy of unstable heads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from stabmon._settings import Bounds, Factor
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import ATTENTION_AND_LOSS, Intervention, intervention
from stabmon.interventions.effects.effect import Effect, Place
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.operator import AttentionOperator
from stabmon.operator.from_call import operator_of
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import AttentionCall
from stabmon.signals.reduce import least_counted

logger = logging.getLogger("stabmon")
LEAST_VISIBLE = 16
"""Fewest visible keys with which a row counts, as in the signal ``normalized_entropy``."""


@intervention
@dataclass(frozen=True)
class EntropyRegularization(Intervention):
    r"""Add a penalty on low attention entropy to the loss.

    The term is :math:`c \sum_\text{heads} \operatorname{mean}_\text{rows} \max(0, f - H / \ln n)`:
    c is ``coefficient``, f is ``floor``, H a row's entropy in nats and n its number of visible keys
    (rows with few do not count, as in the signal ``normalized_entropy``).

    **Preventive at best:** the gradient of the entropy carries the softmax's Jacobian, which
    vanishes (1e-6) in a row that has collapsed; on a small collapsed model it changed nothing. It
    is chosen only where the configuration names it.

    The reported loss stays the model's own. The gradient of the term by query and key, on up to
    ``rows`` sampled rows of each head, is computed in the forward and added in the backward, so
    that every parameter behind query and key receives exactly the gradient of loss + term, whatever
    the model returns. Learned position biases and sinks receive nothing from the term. It costs
    memory of rows times keys per head; the rows come from a random generator of its own.

    It does not reach attention under reentrant activation checkpoints or under ``no_grad``, nor
    queries that are cast to another dtype on their way into the kernel, and warns of that once.

    Example:
        >>> EntropyRegularization(floor=0.3).settings
        {'coefficient': 0.01, 'floor': 0.3, 'rows': 64}
    """

    treats: ClassVar[Mapping[str, int]] = dict.fromkeys(ATTENTION_AND_LOSS, 110)
    # it prevents and does not repair: last of all, and only where the configuration names it

    cost: ClassVar[float] = float("inf")

    coefficient: Factor = 0.01
    """Nats of loss for each unit of normalised entropy below ``floor``."""
    floor: Annotated[float, Bounds(above=0, high=1)] = 0.2
    """Normalised entropy, in (0, 1], above which a row adds nothing."""
    rows: Annotated[int, Bounds(1, 1024)] = 64
    """Query rows sampled from each attention call, 1 to 1024."""

    def _start(self, run: TrainingRun) -> Effect:
        places = list(
            dict.fromkeys(
                (issue.layer, issue.head) for issue in self.issues if issue.layer is not None
            )
        )
        if not places:
            raise NotApplicable("no head is named: give an issue that names its layer")
        return _Regularized(self, run, places)

    def check_saved(self, effect: Stored) -> None:
        for place in effect["places"].parts():
            layer, head = place.parts(2)
            _ = layer.text(), head.maybe(Stored.integer)

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return _Regularized(self, run, [(layer, head) for layer, head in state["places"]])


class _Regularized(Effect):
    """The gradient of the term, added at the query and key of every attention call."""

    def __init__(
        self, settings: EntropyRegularization, run: TrainingRun, places: Sequence[Place]
    ) -> None:
        super().__init__(
            places=places, before={"coefficient": 0.0}, after={"coefficient": settings.coefficient}
        )
        self.settings, self.run = settings, run
        self._heads: dict[str, list[int | None]] = {}
        for layer, head in places:
            self._heads.setdefault(str(layer), []).append(head)
        self._generator = torch.Generator()
        self._hooks: list[Any] = []
        self._warned = False
        self._remove = [
            run.step_hooks.add("attention", self._attend),
            run.step_hooks.add("on_step", self._clear),
        ]

    def release(self) -> None:
        while self._remove:
            self._remove.pop()()
        self._clear()

    def state_dict(self) -> dict[str, Any]:
        return {"places": [list(place) for place in self.places]}

    def _clear(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _attend(self, call: AttentionCall) -> None:
        wanted = self._heads.get(call.layer)
        if wanted is None:
            return
        query, key = _source(call.query), _source(call.key)
        if call.query is None or call.key is None or query is None or key is None:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "entropy_regularization does not reach %s: no gradient flows to its query and "
                    "key",
                    call.layer,
                )
            return
        self._generator.manual_seed(self.run.step)
        operator, share = operator_of(call), self.run.share
        first, _ = share.span(share.own(call.layer) or call.layer, operator.heads)
        heads = sorted(
            {
                h
                for each in wanted
                for h in (range(operator.heads) if each is None else [each - first])
                if 0 <= h < operator.heads
            }
        )
        if not heads:  # they are on other ranks
            return
        index = sampled_rows(operator.queries, self.settings.rows, self._generator)
        index = index.to(call.query.device)
        with torch.enable_grad():
            q, k = (
                call.query.detach().float().requires_grad_(),
                call.key.detach().float().requires_grad_(),
            )
            term = entropy_deficit(q, k, operator, heads, index, self.settings.floor)
            if not term.requires_grad:  # no row sees enough keys
                return
            by_query, by_key = torch.autograd.grad(term, (q, k))
        weight = self.settings.coefficient * self.run.loss_scale
        self._hooks += [
            _add_gradient(query, call.query, by_query * weight),
            _add_gradient(key, call.key, by_key * weight),
        ]


def sampled_rows(queries: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw query rows, one from each of equally long stretches.

    Args:
        queries: number of query rows.
        count: most rows to draw.
        generator: source of the random numbers.

    Returns:
        Ascending row indices, int64, ``[min(count, queries)]`` at most; all rows if ``count``
        suffices.

    Example:
        >>> sampled_rows(3, 8, torch.Generator())
        tensor([0, 1, 2])
        >>> sampled_rows(100, 4, torch.Generator().manual_seed(0)) // 25
        tensor([0, 1, 2, 3])
    """
    if count >= queries:
        return torch.arange(queries)
    edges = torch.linspace(0, queries, count + 1)
    drawn = edges[:-1] + torch.rand(count, generator=generator) * edges.diff()
    rows: Tensor = drawn.floor().long().clamp(max=queries - 1).unique()
    return rows


def entropy_deficit(
    query: Tensor,
    key: Tensor,
    operator: AttentionOperator,
    heads: Sequence[int],
    rows: Tensor,
    floor: float,
) -> Tensor:
    """Return the sum over heads of the mean over rows of max(0, floor - H / ln n).

    Args:
        query: queries ``[B, H, Q, D]``, float32; the result is differentiable by it.
        key: keys ``[B, H_kv, K, D]``, float32; the result is differentiable by it.
        operator: visible keys, scale, softcap and sinks of the attention call.
        heads: query heads to sum over.
        rows: query rows to average over, ``[R]``; those with few visible keys are left out,
            as from the signal ``normalized_entropy``.
        floor: normalised entropy above which a row adds nothing, in (0, 1].

    Returns:
        A scalar; 0 where no row counts.

    Example:
        Keys that are all alike give uniform attention, and no deficit:

        >>> query, key = torch.randn(1, 1, 32, 4), torch.ones(1, 1, 32, 4)
        >>> call = AttentionCall("attn", query=query, key=key, scale=0.5, is_causal=True)
        >>> deficit = entropy_deficit(query, key, operator_of(call), [0], torch.arange(32), 0.5)
        >>> round(deficit.item(), 6)
        0.0
    """
    group = query.shape[1] // key.shape[1]
    visibility = operator.visibility.select(rows)
    hidden, bias = visibility.block(slice(0, len(rows)), slice(0, key.shape[2]))
    visible = visibility.n_visible.expand(query.shape[0], query.shape[1], -1)
    total = torch.zeros((), device=query.device)
    for head in heads:
        logits = operator.scale * (query[:, head, rows] @ key[:, head // group].mT)
        if operator.softcap is not None:
            logits = operator.softcap * torch.tanh(logits / operator.softcap)
        if bias is not None:
            logits = logits + bias.expand(query.shape[0], query.shape[1], -1, -1)[:, head]
        if hidden is not None:
            mask = (
                hidden
                if hidden.ndim == 2
                else hidden.expand(query.shape[0], query.shape[1], -1, -1)[:, head]
            )
            logits = logits.masked_fill(mask, -1e30)
        if operator.sinks is not None:
            sink = operator.sinks[head].float().expand(*logits.shape[:-1], 1)
            logits = torch.cat([logits, sink], dim=-1)
        log_p = torch.log_softmax(logits, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        counts = visible[:, head] >= least_counted(operator.n_visible(), LEAST_VISIBLE)
        if bool(counts.any()):
            total = (
                total
                + (floor - entropy[counts] / visible[:, head][counts].log()).clamp(min=0).mean()
            )
    return total


def _source(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor of the model's graph behind a captured one; None if none.

    A view made without gradients is in no graph, whatever its ``requires_grad`` says; its base is.
    """
    # _base is private: the tensor that a view was made of (checked with torch 2.13). Without it
    # captured views would be reported as not reached.
    for each in (tensor, None if tensor is None else tensor._base):
        if each is not None and each.grad_fn is not None:
            return each
    return None


def _add_gradient(source: Tensor, seen: Tensor, gradient: Tensor) -> Any:
    """Add a gradient by ``seen`` to that of ``source`` in the backward.

    ``seen`` is ``source`` itself or a view of it.
    """
    if source is seen:
        return source.register_hook(lambda arriving: arriving + gradient.to(arriving.dtype))
    whole = torch.zeros(
        source.untyped_storage().nbytes() // source.element_size(),
        dtype=torch.float32,
        device=source.device,
    )
    places = torch.arange(len(whole), device=source.device).as_strided(
        seen.shape, seen.stride(), seen.storage_offset()
    )
    whole.index_add_(0, places.flatten(), gradient.flatten())
    spread = whole.as_strided(source.shape, source.stride(), source.storage_offset())
    return source.register_hook(lambda arriving: arriving + spread.to(arriving.dtype))
