"""Recipes of runs and their faults; parameters are drawn, not chosen.

No two runs are alike but in kind. A recipe does not say whether its run fails. That is for the
outcome to say: many a run recovers from its fault, and some healthy-looking recipes fail.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A small language model over bytes."""

    family: str = "own"
    """``own``, ``llama`` or ``gpt2``."""
    layers: int = 2
    heads: int = 4
    kv_heads: int = 4
    width: int = 64
    length: int = 128
    position: str = "rotary"
    """``rotary`` or ``learned``; like the fields below for ``own`` alone."""
    bias: bool = False
    """Biases of queries, keys and values."""
    qk_norm: bool = False
    window: int | None = None
    scores: str = "fused"
    """``fused``, or computed by hand in ``float32``, ``bfloat16`` or ``float16``."""


@dataclass(frozen=True)
class Recipe:
    """One run: model, data, rate and fault."""

    name: str
    kind: str
    shape: Shape
    text: str = "topics"
    """``topics``, ``library`` (Python modules) or ``copy`` (repeated random bytes)."""
    batch: int = 8
    steps: int = 400
    rate: float = 1e-3
    warmup: int = 20
    schedule: str = "cosine"
    """``cosine``, ``linear`` or ``constant``."""
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    fault: str = "none"
    """Name of a fault in :mod:`testbed.inject_fault`."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def held_back(self) -> bool:
        """Return whether nothing may be tuned on this run: every other one of its kind."""
        return int(self.name.rpartition("-")[2]) % 2 == 1

    def healthy(self) -> Recipe:
        """Return the paired run: the same without the fault and with exact scores.

        New data to learn from is no fault.
        """
        shape = (
            replace(self.shape, scores="float32")
            if self.shape.scores in ("bfloat16", "float16")
            else self.shape
        )
        return (
            self
            if self.fault == "other_text"
            else replace(self, shape=shape, fault="none", settings={})
        )

    def without_growth(self) -> Recipe:
        """Return the same run with attention's growth taken away.

        Queries and keys are normalised; where scores are in a low precision, they are computed in
        float32 instead; where the scale of the scores grows, it stays.
        """
        if self.shape.scores in ("bfloat16", "float16"):
            return replace(self, shape=replace(self.shape, scores="float32"))
        still = {"fault": "none", "settings": {}} if self.fault == "temperature" else {}
        return replace(self, shape=replace(self.shape, qk_norm=True), **still)


def recipes(each: int = 4) -> list[Recipe]:
    """Return ``each`` runs of each kind; the same on every machine."""
    return [_draw(kind, number) for kind in KINDS for number in range(each)]


def _draw(kind: str, number: int) -> Recipe:
    rng = random.Random(f"{kind}-{number}")
    family = rng.choice(["own", "own", "llama", "gpt2"])
    heads = rng.choice([1, 2, 4, 8, 16] if family == "own" else [2, 4, 8])
    width = rng.choice([96, 128]) if heads <= 4 else 128
    shape = Shape(
        family=family,
        layers=rng.choice([2, 3, 4]),
        heads=heads,
        kv_heads=heads if family == "gpt2" or heads < 4 else rng.choice([heads, heads // 2]),
        width=width,
        length=rng.choice([64, 96, 128]),
        position=rng.choice(["rotary", "learned"]),
        bias=rng.random() < 0.5,
    )
    recipe = Recipe(
        name=f"{kind}-{number}",
        kind=kind,
        shape=shape,
        text=rng.choice(["topics", "topics", "library"]),
        batch=1024 // shape.length,
        steps=rng.choice([400, 450, 500]),
        rate=_log_uniform(rng, 1e-3, 3e-3),
        warmup=rng.choice([10, 20, 50]),
        schedule=rng.choice(["cosine", "linear", "constant"]),
        weight_decay=rng.choice([0.0, 0.1]),
        clip=rng.choice([0.5, 1.0, 1.0, 5.0]),
        seed=rng.randrange(10**6),
    )
    return KINDS[kind](recipe, rng)


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _start(recipe: Recipe, rng: random.Random) -> int:
    """Draw a step in mid-run."""
    return int(recipe.steps * rng.uniform(0.2, 0.5))


def _layers(recipe: Recipe, rng: random.Random) -> list[int] | None:
    return rng.choice([None, None, [rng.randrange(recipe.shape.layers)]])


def _with(recipe: Recipe, fault: str, **settings: Any) -> Recipe:
    return replace(recipe, fault=fault, settings=settings)


def _own(recipe: Recipe, **shape: Any) -> Recipe:
    return replace(recipe, shape=replace(recipe.shape, family="own", **shape))


def _qk_ramp(recipe: Recipe, rng: random.Random) -> Recipe:
    factor = _log_uniform(rng, 1.012, 1.06)
    return _with(
        recipe,
        "scale_query_key",
        factor=factor,
        start=_start(recipe, rng),
        steps=10**6,
        layers=_layers(recipe, rng),
    )


def _qk_jump(recipe: Recipe, rng: random.Random) -> Recipe:
    factor = _log_uniform(rng, 4, 10)
    return _with(
        recipe,
        "scale_query_key",
        factor=factor,
        start=_start(recipe, rng),
        steps=1,
        layers=_layers(recipe, rng),
    )


def _qk_rate(recipe: Recipe, rng: random.Random) -> Recipe:
    """Let queries and keys learn far too fast from some step on.

    As after a mistake in parameter groups.
    """
    return _with(
        recipe, "query_key_rate", factor=_log_uniform(rng, 30, 300), start=_start(recipe, rng)
    )


def _rate(recipe: Recipe, rng: random.Random) -> Recipe:
    return _with(recipe, "rate", factor=_log_uniform(rng, 8, 60), start=1, over=1, steps=10**6)


def _rate_ramp(recipe: Recipe, rng: random.Random) -> Recipe:
    over = rng.choice([1, 40, 120])
    return _with(
        recipe,
        "rate",
        factor=_log_uniform(rng, 8, 60),
        start=_start(recipe, rng),
        over=over,
        steps=10**6,
    )


def _temperature(recipe: Recipe, rng: random.Random) -> Recipe:
    """Let the scale of the scores drift."""
    return _with(
        recipe,
        "temperature",
        factor=_log_uniform(rng, 1.03, 1.08),
        start=_start(recipe, rng),
        steps=120,
    )


def _init(recipe: Recipe, rng: random.Random) -> Recipe:
    return _with(
        recipe, "scale_query_key", factor=_log_uniform(rng, 8, 30), start=0, steps=1, layers=None
    )


def _precision(recipe: Recipe, rng: random.Random) -> Recipe:
    """Let queries and keys drift along a direction common to all keys.

    Nothing to a softmax, all to a format's range and digits.
    """
    recipe = _own(recipe, scores=rng.choice(["float16", "bfloat16"]), bias=True, position="learned")
    start = _start(recipe, rng)
    product = (
        _log_uniform(rng, 1.5e5, 1.5e6)
        if recipe.shape.scores == "float16"
        else _log_uniform(rng, 2e4, 2e5)
    )
    return _with(
        recipe, "shared_drift", factor=product ** (0.5 / (recipe.steps - start)), start=start
    )


def _embedding(recipe: Recipe, rng: random.Random) -> Recipe:
    start, steps = _start(recipe, rng), rng.choice([1, 30])
    return _with(
        recipe,
        "scale",
        part="embedding",
        factor=_log_uniform(rng, 8, 60) ** (1 / steps),
        start=start,
        steps=steps,
    )


def _mlp(recipe: Recipe, rng: random.Random) -> Recipe:
    start, steps = _start(recipe, rng), rng.choice([1, 30])
    return _with(
        recipe,
        "scale",
        part="mlp",
        factor=_log_uniform(rng, 10, 100) ** (1 / steps),
        start=start,
        steps=steps,
    )


def _bad_data(recipe: Recipe, rng: random.Random) -> Recipe:
    """Replace a share of each batch by noise from some step on."""
    return _with(
        recipe, "noise", share=rng.uniform(0.5, 1.0), start=_start(recipe, rng), steps=10**6
    )


def _rate_spike(recipe: Recipe, rng: random.Random) -> Recipe:
    return _with(
        recipe,
        "rate",
        factor=_log_uniform(rng, 30, 200),
        start=_start(recipe, rng),
        over=1,
        steps=rng.choice([5, 20]),
    )


def _not_finite(recipe: Recipe, rng: random.Random) -> Recipe:
    return _with(
        recipe,
        "infinite_gradient",
        start=_start(recipe, rng),
        layer=rng.randrange(recipe.shape.layers),
    )


def _plain(recipe: Recipe, rng: random.Random) -> Recipe:
    return recipe


def _high_rate(recipe: Recipe, rng: random.Random) -> Recipe:
    return replace(recipe, rate=recipe.rate * rng.uniform(1.5, 2.5), warmup=50)


def _no_warmup(recipe: Recipe, rng: random.Random) -> Recipe:
    return replace(recipe, warmup=0)


def _short(recipe: Recipe, rng: random.Random) -> Recipe:
    length = rng.choice([8, 16, 24])
    return replace(recipe, shape=replace(recipe.shape, length=length), batch=512 // length)


def _windowed(recipe: Recipe, rng: random.Random) -> Recipe:
    return _own(recipe, window=rng.choice([4, 8, 16]))


def _copy(recipe: Recipe, rng: random.Random) -> Recipe:
    """Repeat random bytes once.

    Heads that find the first time are one-hot, and right.
    """
    recipe = replace(
        recipe, text="copy", steps=450, rate=3e-3, schedule="constant", weight_decay=0.0
    )
    return replace(
        recipe,
        shape=replace(
            recipe.shape, layers=2, length=rng.choice([48, 64]), family=rng.choice(["own", "llama"])
        ),
    )


def _large_scores(recipe: Recipe, rng: random.Random) -> Recipe:
    """Make scores large from the first step on, and for good."""
    return _with(
        recipe, "scale_query_key", factor=_log_uniform(rng, 2, 4), start=0, steps=1, layers=None
    )


def _hard_batches(recipe: Recipe, rng: random.Random) -> Recipe:
    return _with(recipe, "noise", share=1.0, start=_start(recipe, rng), steps=rng.choice([1, 3]))


def _little_push(recipe: Recipe, rng: random.Random) -> Recipe:
    factor = _log_uniform(rng, 1.1, 1.4)
    return _with(
        recipe,
        "scale_query_key",
        factor=factor,
        start=_start(recipe, rng),
        steps=1,
        layers=_layers(recipe, rng),
    )


def _normalised(recipe: Recipe, rng: random.Random) -> Recipe:
    return replace(_own(recipe, qk_norm=True), rate=recipe.rate * rng.uniform(1, 2))


def _new_data(recipe: Recipe, rng: random.Random) -> Recipe:
    """Switch to another text at some step: harder for a while, and then learned."""
    return _with(recipe, "other_text", start=_start(recipe, rng))


KINDS: Mapping[str, Callable[[Recipe, random.Random], Recipe]] = {
    "qk_ramp": _qk_ramp,
    "qk_jump": _qk_jump,
    "qk_rate": _qk_rate,
    "rate": _rate,
    "rate_ramp": _rate_ramp,
    "temperature": _temperature,
    "init": _init,
    "precision": _precision,
    "embedding": _embedding,
    "mlp": _mlp,
    "bad_data": _bad_data,
    "rate_spike": _rate_spike,
    "not_finite": _not_finite,
    "plain": _plain,
    "high_rate": _high_rate,
    "no_warmup": _no_warmup,
    "short": _short,
    "windowed": _windowed,
    "copy": _copy,
    "large_scores": _large_scores,
    "hard_batches": _hard_batches,
    "little_push": _little_push,
    "normalised": _normalised,
    "new_data": _new_data,
}
