"""The oracle: every row written out in float64, for tests and small inputs only.

Memory grows with Q x K.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from stabmon.operator.base import AttentionOperator
from stabmon.operator.statistics import EMPTY_ROW


class DenseAttention(AttentionOperator):
    """All Q x K logits of all heads in float64."""

    engine = "dense"
    compute_dtype = torch.float64

    @cached_property
    def _hidden_and_bias(self) -> tuple[Tensor | None, Tensor | None]:
        return self.visibility.block(slice(0, self.queries), slice(0, self.keys))

    @cached_property
    def scores(self) -> Tensor:
        """``[B, H, Q, K]`` scores before any softcap, bias added, hidden keys at -inf."""
        return self._hide(self._raw)

    @cached_property
    def logits(self) -> Tensor:
        """``[B, H, Q, K]`` arguments of the softmax, hidden keys at -inf."""
        capped = (
            self._raw
            if self.softcap is None
            else self.softcap * torch.tanh(self._raw / self.softcap)
        )
        return self._hide(capped)

    @cached_property
    def probabilities(self) -> Tensor:
        """``[B, H, Q, K]``; rows that see nothing are 0."""
        logits = self._with_sink(self.logits)
        p = torch.softmax(logits, dim=-1)[..., : self.keys]
        return torch.where(self.occupied[..., None], p, 0.0)

    @cached_property
    def _raw(self) -> Tensor:
        if self.given_scores is not None:
            return self.given_scores.double()
        key = self.key.double().repeat_interleave(self.heads // self.key_heads, dim=1)
        return self.scale * (self.query.double() @ key.mT)

    def _hide(self, scores: Tensor) -> Tensor:
        hidden, bias = self._hidden_and_bias
        if bias is not None:
            scores = scores + bias.double()
        return scores if hidden is None else scores.masked_fill(hidden, -math.inf)

    def _lifted(self, scores: Tensor) -> Tensor:
        """Return the scores with hidden keys at +inf."""
        hidden, _ = self._hidden_and_bias
        return scores if hidden is None else scores.masked_fill(hidden, math.inf)

    def _with_sink(self, logits: Tensor) -> Tensor:
        if self.sinks is None:
            return logits
        sink = self.sinks_of_rows().double()[..., None]
        return torch.cat([logits, sink], dim=-1)

    def _compute(self, statistics: set[str]) -> dict[str, Tensor]:
        everything = self._with_sink(self.logits)
        log_p = torch.log_softmax(everything, dim=-1)
        p = log_p.exp()
        finite = everything.isneginf().logical_not()
        top = self.logits.amax(-1, keepdim=True)
        rest = everything.scatter(-1, self.logits.argmax(-1, keepdim=True), -math.inf) - top
        rows: dict[str, Tensor] = {
            "log_partition": everything.logsumexp(-1),
            "log_partition_2": (2 * everything).logsumexp(-1),
            "log_partition_3": (3 * everything).logsumexp(-1),
            "mean_score": torch.where(finite, p * everything, 0.0).sum(-1),
            "entropy": -torch.where(finite, p * log_p, 0.0).sum(-1),
            "collision": p.square().sum(-1),
            "jacobian_norm": self._jacobian_norm(p),
            "max_score": self.scores.amax(-1),
            "min_score": self._lifted(self.scores).amin(-1),
            "max_logit": top[..., 0],
            "min_logit": self._lifted(self.logits).amin(-1),
            "log_odds_of_rest": rest.logsumexp(-1),
            "first_key_mass": self._first_key_mass(),
        }
        return {
            name: torch.where(self.occupied, row, EMPTY_ROW.get(name, 0.0))
            for name, row in rows.items()
        }

    def _jacobian_norm(self, p: Tensor) -> Tensor:
        two, three = p.square().sum(-1), p.pow(3).sum(-1)
        return (two - 2 * three + two.square()).clamp(min=0).sqrt()

    def _first_key_mass(self) -> Tensor:
        first = self.visibility.first_visible
        if first is None:
            return self.probabilities[..., 0]
        index = first.expand(self.batch, self.heads)[..., None, None].expand(
            -1, -1, self.queries, 1
        )
        return self.probabilities.gather(-1, index)[..., 0]

    def _matvec(self, x: Tensor) -> Tensor:
        return self.probabilities @ x.double()

    def _rmatvec(self, y: Tensor) -> Tensor:
        return self.probabilities.mT @ y.double()
