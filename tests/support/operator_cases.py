"""Attention calls of every kind, and what every statistic of them must be: written out in float64
from the definitions alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stabmon.operator import AttentionOperator, attention_operator

ENGINES = ("dense", "blockwise", "fused")
EMPTY = {
    "log_partition": -math.inf,
    "log_partition_2": -math.inf,
    "log_partition_3": -math.inf,
    "max_score": -math.inf,
    "max_logit": -math.inf,
    "min_score": math.inf,
    "min_logit": math.inf,
    "log_odds_of_rest": -math.inf,
}
LEAST_LOG_ODDS = -87.0
"""Below this float32 has no, or only denormal, odds: -inf and anything as small are the same
answer.
"""


@dataclass(frozen=True)
class Case:
    """One call: queries, keys, and how they are masked."""

    query: Tensor
    key: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 0.25

    def operator(self, engine: str) -> AttentionOperator:
        return attention_operator(
            self.query, self.key, scale=self.scale, engine=engine, **self.options
        )


@dataclass(frozen=True)
class Truth:
    """The rows written out: ``visible``, raw ``scores`` and ``logits`` are ``[B, H, Q, K]``; hidden
    entries hold anything.
    """

    visible: Tensor
    scores: Tensor
    logits: Tensor
    sinks: Tensor | None
    first_key: Tensor
    """``[B, H]``: the first key that the mask lets any query see; causality and window have no
    say.
    """

    @property
    def probabilities(self) -> Tensor:
        """``[B, H, Q, K]``; 0 where hidden."""
        return torch.softmax(self._all(), -1)[..., : self.logits.shape[-1]].masked_fill(
            ~self.visible.any(-1, keepdim=True), 0.0
        )

    def _all(self) -> Tensor:
        """Logits, hidden ones -inf, with the sink as one more column."""
        hidden = self.logits.masked_fill(~self.visible, -math.inf)
        if self.sinks is None:
            return hidden
        return torch.cat(
            [hidden, self.sinks.double().view(1, -1, 1, 1).expand(*hidden.shape[:3], 1)], -1
        )

    def statistics(self) -> dict[str, Tensor]:
        """Each ``[B, H, Q]`` in float64."""
        z, p = self._all(), torch.softmax(self._all(), -1)
        possible = p != 0  # keeps NaN, leaves out 0 * -inf
        top = self.logits.masked_fill(~self.visible, -math.inf)
        rest = z.scatter(-1, top.argmax(-1, keepdim=True), -math.inf)
        found = {
            "log_partition": z.logsumexp(-1),
            "log_partition_2": (2 * z).logsumexp(-1),
            "log_partition_3": (3 * z).logsumexp(-1),
            "mean_score": torch.where(possible, p * z, 0.0).sum(-1),
            "entropy": torch.where(possible, -p * p.log(), 0.0).sum(-1),
            "collision": (p**2).sum(-1),
            "jacobian_norm": ((p**2).sum(-1) - 2 * (p**3).sum(-1) + (p**2).sum(-1) ** 2)
            .clamp(min=0)
            .sqrt(),
            "max_score": self.scores.masked_fill(~self.visible, -math.inf).amax(-1),
            "min_score": self.scores.masked_fill(~self.visible, math.inf).amin(-1),
            "max_logit": top.amax(-1),
            "min_logit": self.logits.masked_fill(~self.visible, math.inf).amin(-1),
            "log_odds_of_rest": rest.logsumexp(-1) - top.amax(-1),
            "first_key_mass": p.gather(-1, self.first_key[..., None, None].expand(*p.shape[:3], 1))[
                ..., 0
            ],
        }
        seen = self.visible.any(-1)
        return {name: torch.where(seen, rows, EMPTY.get(name, 0.0)) for name, rows in found.items()}


def truth(case: Case) -> Truth:
    """The case by the definitions of its options, entry by entry."""
    query, key, options = case.query.double(), case.key.double(), case.options
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    scores = case.scale * query @ key.repeat_interleave(heads // key.shape[1], dim=1).mT
    cap = options.get("softcap")
    logits = scores if cap is None else cap * torch.tanh(scores / cap)
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    ahead = torch.arange(keys)[None] - (torch.arange(queries)[:, None] + keys - queries)
    if options.get("is_causal"):
        visible &= ahead <= 0
    window = options.get("window")
    if window is not None:
        visible &= (ahead > -window) & (ahead < window)
    allowed = torch.ones_like(visible)
    mask = options.get("mask")
    if mask is not None and mask.dtype == torch.bool:
        allowed &= mask
    elif mask is not None:
        classic = bool(((mask == 0) | (mask == mask.min())).all()) and mask.min() <= -9999
        hidden = (mask == mask.min()) if classic else mask <= torch.finfo(mask.dtype).min / 2
        bias = mask.masked_fill(hidden, 0.0).double()
        allowed &= ~hidden
        scores, logits = scores + bias, logits + bias
    return Truth(
        visible & allowed, scores, logits, options.get("sinks"), allowed.any(2).float().argmax(-1)
    )


def assert_statistic(
    name: str,
    found: Tensor,
    wanted: Tensor,
    largest_score: float,
    float32: bool = True,
    summed: int = 0,
) -> None:
    """``found`` is ``wanted`` up to the rounding of scores: 1e-6 of the largest score, with some
    nats' digits besides.

    ``summed`` terms were added up in float32 to a number as large as a score, in whatever order:
    that rounds by about the root of their number, in units of 2^-24 (Higham & Mary, SIAM J. Sci.
    Comput. 41, 2019).
    """
    found = found.double()
    if name == "log_odds_of_rest" and float32:
        found, wanted = (
            found.masked_fill(found < LEAST_LOG_ODDS, -math.inf),
            wanted.masked_fill(wanted < LEAST_LOG_ODDS, -math.inf),
        )
    tolerance = 3e-5 + 2e-6 * largest_score if float32 else 1e-9 + 1e-12 * largest_score
    tolerance += summed**0.5 * 2.0**-24 * largest_score
    close = torch.isclose(
        found, wanted, rtol=1e-6 if float32 else 1e-12, atol=tolerance, equal_nan=True
    )
    assert close.all(), (
        f"{name}: {found[~close][:5]} for {wanted[~close][:5]} at "
        f"{close.logical_not().nonzero()[:5].tolist()}"
    )


def _random(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def plain(
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 4,
    queries: int = 37,
    keys: int = 37,
    dim: int = 16,
    **options: Any,
) -> Case:
    """Random queries and keys with scores of about 1."""
    randn = _random()
    return Case(randn(batch, heads, queries, dim), randn(batch, key_heads, keys, dim), options)


def padding(keys: int, *, left: int = 0, right: int = 0) -> Tensor:
    """``[2, 1, 1, K]`` bool; the second batch element is padded."""
    mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
    mask[1, ..., :left] = False
    mask[1, ..., keys - right :] = False
    return mask


def additive(visible: Tensor, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A float mask that hides with ``value``."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, value)


def _cases() -> dict[str, Case]:
    randn = _random(1)
    lower = torch.ones(37, 37, dtype=torch.bool).tril()
    holes = torch.rand(2, 4, 37, 37, generator=torch.Generator().manual_seed(2)) > 0.4
    packed = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool) for n in (10, 7, 20)])[
        None, None
    ]
    empty = holes.clone()
    empty[0, :, 5], empty[1, 2, :] = False, False
    alibi = -torch.arange(37.0).flip(0) * torch.tensor([0.5, 0.25, 0.1, 0.05])[:, None]
    lowest = {
        dtype: torch.finfo(dtype).min
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    }
    cases = {
        "everything visible": plain(),
        "causal": plain(is_causal=True),
        "causal, more keys than queries": plain(queries=11, is_causal=True),
        "causal, more queries than keys": plain(keys=11, is_causal=True),
        "one query over a cache": plain(queries=1, is_causal=True),
        "single key": plain(keys=1),
        "single query and key": plain(queries=1, keys=1, is_causal=True),
        "grouped heads": plain(heads=6, key_heads=2, is_causal=True),
        "one key head": plain(heads=4, key_heads=1, is_causal=True),
        "cross attention": plain(queries=9, keys=50),
        "long enough for several blocks": plain(
            batch=1, heads=2, key_heads=1, queries=300, keys=300, is_causal=True
        ),
        "causal window": plain(is_causal=True, window=5),
        "causal window of one": plain(is_causal=True, window=1),
        "causal window beyond the keys": plain(is_causal=True, window=100),
        "causal window, more keys than queries": plain(queries=11, is_causal=True, window=5),
        "window on both sides": plain(window=5),
        "window on both sides over several blocks": plain(
            batch=1, queries=300, keys=300, window=40
        ),
        "causal window over several blocks": plain(
            batch=1, queries=300, keys=300, is_causal=True, window=40
        ),
        "bool mask": plain(mask=holes),
        "bool mask of two dimensions": plain(mask=lower),
        "bool mask, one head for all": plain(mask=holes[:, :1], is_causal=True),
        "bool mask over grouped heads": plain(key_heads=2, mask=holes),
        "packed sequences": plain(mask=packed, is_causal=True),
        "key padding left": plain(mask=padding(37, left=6), is_causal=True),
        "key padding right": plain(mask=padding(37, right=6), is_causal=True),
        "key padding both sides, no causality": plain(mask=padding(37, left=3, right=6)),
        "padding and window": plain(mask=padding(37, left=6), is_causal=True, window=5),
        "padding over several blocks": plain(
            queries=300,
            keys=300,
            heads=2,
            key_heads=1,
            mask=padding(300, left=70, right=40) & torch.ones(300, 300, dtype=torch.bool).tril(),
        ),
        "rows that see nothing": plain(mask=empty),
        "nothing visible at all": plain(mask=torch.zeros(1, 1, 1, 37, dtype=torch.bool)),
        "additive -inf": plain(mask=additive(holes, -math.inf)),
        "additive -10000": plain(mask=additive(holes, -10000.0)),
        "additive -1e9": plain(mask=additive(holes, -1e9)),
        "additive zeros": plain(mask=torch.zeros(1, 1, 37, 37)),
        "softcap": plain(is_causal=True, softcap=1.5),
        "learned sinks": plain(is_causal=True, sinks=randn(4) * 3),
        "learned sinks over rows that see nothing": plain(mask=empty, sinks=randn(4)),
        "pairwise bias": plain(mask=randn(1, 4, 37, 37)),
        "pairwise bias, causal": plain(mask=alibi[None, :, None], is_causal=True),
        "pairwise bias with holes": plain(
            mask=torch.where(holes, randn(2, 4, 37, 37), torch.finfo(torch.float32).min)
        ),
        "softcap, bias and sinks": plain(
            mask=randn(2, 1, 37, 37), softcap=2.0, sinks=randn(4), is_causal=True, key_heads=2
        ),
        "negative scale": Case(
            randn(2, 4, 20, 8), randn(2, 4, 20, 8), {"is_causal": True}, scale=-0.3
        ),
        "large scores": Case(
            20 * randn(2, 4, 37, 16), 5 * randn(2, 4, 37, 16), {"is_causal": True}
        ),
        "ties at the maximum": Case(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 8, 4), {}, scale=10.0),
        "head dimension of one": Case(randn(2, 2, 9, 1), randn(2, 2, 9, 1), {"is_causal": True}),
    }
    for dtype, value in lowest.items():
        cases[f"additive finfo({dtype}).min"] = plain(mask=additive(lower & holes, value, dtype))
    return cases


CASES = _cases()
