"""One run: model, data, optimizer and faults."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """Fault at the steps ``start … stop - 1``, counted from 0."""

    name: str
    """``random_labels``, ``random_batch``; ``rate`` or ``rate:GROUP`` times ``value``;

    ``weight_decay`` set to ``value``, from ``start`` on; ``embedding``, ``mlp`` or ``query_key``
    weights times ``value`` once; ``embedding_nan``.
    """
    start: int
    stop: int
    value: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """One run: model, data, optimizer and faults."""

    name: str
    paired: str = "base"
    """Recipe of the healthy paired run on the same batches; the run's own name without any."""
    without_growth: str = ""
    """Recipe of the same run with attention's growth taken away; empty where there is none."""
    layers: int = 2
    width: int = 64
    heads: int = 4
    length: int = 64
    batch: int = 8
    position: str = "rotary"
    """``rotary``, ``learned`` or ``alibi``."""
    alibi: float = 1.0
    """Factor of ALiBi's slopes."""
    window: int = 0
    """Newest keys that are visible; 0 for all."""
    sink: float = 0.0
    """Added to head 0's score of key 0."""
    qk_norm: bool = False
    post_norm: bool = False
    scale: float = 1.0
    """Factor of 1 / sqrt(head dimension)."""
    scale_ramp: tuple[int, int, float] | None = None
    """First step, last step and final value of a further factor that grows geometrically."""
    query_key_init: float = 1.0
    """Factor of W_q and W_k at initialisation."""
    precision: str = "float32"
    """``float32``, ``autocast_bfloat16``, ``autocast_float16``, ``bfloat16_weights``;

    scores by hand in ``float16_scores`` or ``bfloat16_scores``, or by exp and sum in
    ``exp_float32`` or ``exp_float16``; ``float16_mlp``.
    """
    text: str = "text"
    """``text``, ``code``, ``copy`` (random bytes, repeated) or ``sum`` (of the last two bytes)."""
    steps: int = 400
    optimizer: str = "adamw"
    """``adamw``, or ``sgd`` with momentum 0.9."""
    rate: float = 3e-3
    schedule: str = "cosine"
    """``cosine``, to a tenth, or ``constant``; after the warmup."""
    warmup: int = 50
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest gradient norm; 0 for none."""
    query_key_rate: float = 1.0
    """Factor of the rate of W_q and W_k."""
    query_key_rate_from: int = 0
    """Step from which that factor holds, counted from 0."""
    rate_caps: tuple[tuple[str, float], ...] = ()
    """Parameter groups, and the highest rate that the loop lets each have."""
    faults: tuple[Fault, ...] = ()

    @property
    def family(self) -> str:
        """Name that the recipe shares with others like it, of which none may be on both sides."""
        drawn = re.match(r"[DE]\d+_", self.name)
        return drawn[0][:-1] if drawn else re.sub(r"[\d.]+.*", "", self.name) or self.name

    @property
    def at_start(self) -> bool:
        """True if the run is wrong from its first step, so that no alarm can be a forecast."""
        return self.scale > 1 or self.query_key_init > 1

    @property
    def fault_step(self) -> int:
        """Step before which nothing is wrong, counted from 1; 0 where something is from the start."""
        starts = [each.start for each in self.faults] + [self.query_key_rate_from]
        starts += [self.scale_ramp[0]] if self.scale_ramp else []
        return max(starts) + 1 if max(starts) else 0


def own_pair(name: str, **settings: Any) -> Recipe:
    """Make a recipe whose run has no paired one."""
    return Recipe(name, paired=name, **settings)
