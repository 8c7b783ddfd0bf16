"""Recipes whose parameters are drawn."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from tests.bench.byte_gpt.recipe import Fault, Recipe, own_pair

EARLY = ["lr", "lrqk", "scale", "qkinit"] * 2
MIDDLE = ["lrqk_late", "grow", "ramp", "qk_mul"] * 2
OTHER = ["noise", "sus", "lr_head", "sus", "lr_mlp", "sus", "wd", "sus"]
"""Faults of the eight shapes: from the start, in mid-run, and not by attention.

``sus`` is a healthy run that looks suspicious.
"""


def draw(seed: int, prefix: str) -> list[Recipe]:
    """Draw eight shapes, each with its paired run and three others."""
    rng = random.Random(seed)
    texts = ["text", "code", "text", "copy", "code", "text", "code", "copy"]
    early, middle, other = list(EARLY), list(MIDDLE), list(OTHER)
    for each in (early, middle, other):
        rng.shuffle(each)
    found = []
    for number, text in enumerate(texts):
        pair = _shape(rng, f"{prefix}{number}_twin", text)
        found += [pair, *_at_start(rng, pair, early[number])]
        start = rng.randrange(80, 250)
        found += _in_middle(rng, pair, middle[number], start)
        found += _elsewhere(rng, pair, other[number], start)
    return found


def _shape(rng: random.Random, name: str, text: str) -> Recipe:
    width = rng.choice([64, 96, 128])
    heads = rng.choice([each for each in (1, 2, 4, 8, 16) if width // each % 2 == 0])
    length = int(_log_uniform(rng, 32, 128)) // 8 * 8
    length = min(length, 64) if text == "copy" else length
    return own_pair(
        name,
        layers=rng.choice([2, 3, 4]),
        width=width,
        heads=heads,
        length=length,
        batch=max(4, round(512 / length)),
        text=text,
        rate=_log_uniform_3(rng, 2e-3, 5e-3),
        position=rng.choice(["rotary", "rotary", "learned"]),
        weight_decay=rng.choice([0.0, 0.1]),
        beta2=rng.choice([0.95, 0.99]),
        warmup=rng.choice([20, 50, 80]),
    )


def _variant(pair: Recipe, name: str, **changes: Any) -> Recipe:
    return replace(pair, name=pair.name.replace("twin", name), **changes)


def _beside_qk_norm(pair: Recipe, name: str, **changes: Any) -> list[Recipe]:
    """Return a variant and, as what it is without attention's growth, the same with QK-norm."""
    normed = _variant(pair, f"{name}_qkn", qk_norm=True, **changes)
    return [normed, _variant(pair, name, without_growth=normed.name, **changes)]


def _at_start(rng: random.Random, pair: Recipe, name: str) -> list[Recipe]:
    if name == "lr":
        return _beside_qk_norm(pair, name, rate=_log_uniform_3(rng, 1e-2, 1.5e-1))
    field, low, high = {
        "lrqk": ("query_key_rate", 5, 100),
        "scale": ("scale", 3, 30),
        "qkinit": ("query_key_init", 1.7, 8),
    }[name]
    change = {field: _log_uniform_3(rng, low, high)}
    return [_variant(pair, name, without_growth=pair.name, **change)]


def _in_middle(rng: random.Random, pair: Recipe, name: str, start: int) -> list[Recipe]:
    change: dict[str, Any]
    if name == "ramp":
        change = {"rate": _log_uniform_3(rng, 2e-2, 2e-1), "warmup": 400, "schedule": "constant"}
        return _beside_qk_norm(pair, name, **change)
    if name == "lrqk_late":
        factor = _log_uniform_3(rng, 8, 100)
        change = {"query_key_rate": factor, "query_key_rate_from": start}
    elif name == "grow":
        stop = start + rng.randrange(40, 150)
        change = {"scale_ramp": (start, stop, _log_uniform_3(rng, 10, 1000))}
    else:
        fault = Fault("query_key", start, start + 1, _log_uniform_3(rng, 2, 8))
        change = {"faults": (fault,)}
    return [_variant(pair, name, without_growth=pair.name, **change)]


def _elsewhere(rng: random.Random, pair: Recipe, name: str, start: int) -> list[Recipe]:
    if name == "sus":
        return _suspicious(rng, pair)
    if name == "noise":
        fault = Fault("random_labels", start, 400)
    elif name == "lr_head":
        fault = Fault("rate:head", start, 400, _log_uniform_3(rng, 30, 1000))
    elif name == "lr_mlp":
        fault = Fault("rate:mlp", start, start + 20, _log_uniform_3(rng, 100, 1000))
    else:
        fault = Fault("weight_decay", start, 400, _log_uniform_3(rng, 5, 60))
    return [_variant(pair, name, faults=(fault,))]


def _suspicious(rng: random.Random, pair: Recipe) -> list[Recipe]:
    name = rng.choice(["lr2", "sink", "window", "alibi", "b2", "qkn_lr"])
    if name == "lr2":
        return _beside_qk_norm(
            pair, name, rate=float(f"{pair.rate * _log_uniform(rng, 1.5, 3):.3g}")
        )
    if name == "b2":
        return [_variant(pair, name, beta2=rng.choice([0.9, 0.999]), warmup=0)]
    if name == "qkn_lr":
        return [_variant(pair, name, qk_norm=True, rate=_log_uniform_3(rng, 1e-2, 3e-2))]
    change: dict[str, Any]
    if name == "sink":
        change = {"sink": float(f"{rng.uniform(4, 14):.3g}")}
    elif name == "window":
        change = {"window": rng.choice([4, 8, 16])}
    else:
        change = {"position": "alibi", "alibi": _log_uniform_3(rng, 1, 8)}
    own = _variant(pair, name, **change)
    return [replace(own, paired=own.name)]


def _log_uniform(rng: random.Random, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _log_uniform_3(rng: random.Random, low: float, high: float) -> float:
    """Draw a number of three digits."""
    return float(f"{_log_uniform(rng, low, high):.3g}")
