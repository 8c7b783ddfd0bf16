"""Measure the cost of watching: seconds, memory, and waits of the host for the device."""

from __future__ import annotations

import functools
import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import stabmon
from tests.bench.gpu_checks.harness import Check, Found, Place, Skipped
from tests.bench.gpu_checks.models import FAMILIES, tokens

WARM = 36
"""Steps before any is timed: the first are probed, at 32 the last."""
EVERY = 10
AIMS = {10: 1.01, 50: 1.002}
"""Samples every so many steps -> ratio of step times aimed at, which is told and not enforced."""
COMPILING = 70
"""Seconds that must be left for a setting that is compiled."""
LIMIT = 1.10
"""Ratio at every 50 above which the check fails."""


@dataclass(frozen=True)
class Setting:
    """One model in one way."""

    name: str
    family: str
    width: int
    layers: int
    length: int
    batch: int
    vocabulary: int
    compiled: bool = False
    rounds: int = 4

    def smaller(self) -> Setting:
        """For a test of this check on a CPU."""
        return Setting(self.name, self.family, 128, 2, 64, 2, 512, False, 2)


SETTINGS = (
    Setting("gpt2 124M S=1024", "gpt2", 768, 12, 1024, 8, 50257),
    Setting("llama 300M S=2048", "llama", 1024, 20, 2048, 4, 32000, rounds=3),
    Setting("gpt2 124M S=1024 compiled", "gpt2", 768, 12, 1024, 8, 50257, compiled=True),
    Setting(
        "llama 300M S=2048 compiled", "llama", 1024, 20, 2048, 4, 32000, compiled=True, rounds=3
    ),
)


@dataclass
class Stepper:
    """A model in training, watched or not."""

    setting: Setting
    place: Place
    watched: bool
    every: int = EVERY
    monitor: Any = None
    count: int = 0
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {"sampled": [], "unsampled": []}
    )
    peaks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s = self.setting
        self.model = FAMILIES[s.family](
            self.place, s.width, s.layers, s.length, s.vocabulary, dropout=0.0
        )
        self.called = torch.compile(self.model) if s.compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        self.batch = tokens(self.place, s.batch, s.length, s.vocabulary)
        if self.watched:
            self.monitor = stabmon.AttentionStabilityMonitor(
                self.called,
                self.optimizer,
                config="observe",
                log_every=self.every,
                schedule="fixed",
                sinks=[],
            )

    def step(self) -> None:
        """One optimizer step."""
        self.count += 1
        self.optimizer.zero_grad()
        with torch.autocast(self.place.device.type, torch.bfloat16):
            loss = self.called(input_ids=self.batch, labels=self.batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if self.monitor is not None:
            self.monitor.on_step(loss=loss)

    def timed_step(self) -> None:
        """One step between two waits for the device, entered by its kind."""
        sampled = self.monitor is not None and self.monitor.is_sampled(self.count + 1)
        kind = "sampled" if sampled else "unsampled"
        self.place.wait()
        if self.place.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        base, began = self.allocated(), time.perf_counter()
        self.step()
        self.place.wait()
        self.seconds[kind].append(time.perf_counter() - began)
        if self.place.is_cuda:
            self.peaks[kind] = max(
                self.peaks.get(kind, 0), torch.cuda.max_memory_allocated() - base
            )

    def block(self, steps: int) -> float:
        """Seconds a step over several without a wait in between, as in training."""
        self.place.wait()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.place.wait()
        return (time.perf_counter() - began) / steps

    def allocated(self) -> int:
        """Bytes allocated on the device now."""
        return torch.cuda.memory_allocated() if self.place.is_cuda else 0

    def close(self) -> None:
        """Leave the model."""
        if self.monitor is not None:
            self.monitor.close()


def checks(place: Place) -> Iterator[Check]:
    """Every check of this section, from the most important."""
    pairs: dict[str, tuple[Stepper, Stepper]] = {}
    for setting in SETTINGS:
        chosen = setting.smaller() if place.small else setting
        yield setting.name, functools.partial(cost, place, chosen, pairs)
        yield (
            f"waits for the device, {setting.name}",
            functools.partial(waits, place, chosen.name, pairs),
        )
        pairs.clear()


def cost(place: Place, setting: Setting, pairs: dict[str, tuple[Stepper, Stepper]]) -> Found:
    """Plain and watched steps by turns: each by itself, then in blocks as they run in training."""
    if setting.compiled and place.left() < COMPILING:
        raise Skipped(f"compiling needs {COMPILING} s, {place.left():.0f} are left")
    warm = 12 if place.small else WARM
    plain, watched = Stepper(setting, place, False), Stepper(setting, place, True)
    pairs[setting.name] = plain, watched
    began = time.perf_counter()
    plain.step()
    watched.step()
    place.wait()
    first = time.perf_counter() - began
    for each in (plain, watched):
        for _ in range(warm - 1 if each is watched else 4):
            each.step()
    while watched.count % EVERY:  # blocks begin alike
        watched.step()
    blocks = {"plain": [], "watched": []}
    for at in range(setting.rounds):
        for each in ((plain, watched), (watched, plain))[at % 2]:
            blocks["watched" if each is watched else "plain"].append(each.block(EVERY))
    for at in range(2 * EVERY):
        for each in ((plain, watched), (watched, plain))[at % 2]:
            each.timed_step()
    errors = dict(watched.monitor.errors)
    reading = watched.monitor.state_dict()["step"]
    base = statistics.median(plain.seconds["unsampled"])
    unsampled = statistics.median(watched.seconds["unsampled"])
    sampled = statistics.median(watched.seconds["sampled"])
    real = statistics.median(b / a for a, b in zip(blocks["plain"], blocks["watched"], strict=True))
    in_training = statistics.median(blocks["plain"])
    ratios = {n: ((n - 1) * unsampled + sampled) / n / base for n in AIMS}
    # an unsampled step in training, where the host runs ahead: a block less the excess of its
    # sampled step
    ahead = (
        (EVERY * real * in_training - (sampled - unsampled) - EVERY * in_training)
        / EVERY
        / in_training
    )
    every_50 = 1 + ahead + (sampled - unsampled) / 50 / in_training
    memory = {
        kind: watched.peaks.get(kind, 0) - plain.peaks.get("unsampled", 0)
        for kind in ("unsampled", "sampled")
    }
    words = (
        f"plain {1e3 * base:.1f} ms ({1e3 * in_training:.1f} in blocks), "
        f"unsampled {unsampled / base:.4f}, "
        f"sampled {sampled / base:.2f} (+{1e3 * (sampled - unsampled):.0f} ms); "
        f"every 10: {ratios[10]:.4f} from single steps, {real:.4f} in blocks; "
        f"every 50: {ratios[50]:.4f}, {every_50:.4f} in blocks; "
        f"memory +{memory['unsampled'] / 2**20:.0f} and sampled "
        f"+{memory['sampled'] / 2**20:.0f} MiB on "
        f"{plain.peaks.get('unsampled', 0) / 2**20:.0f}; first steps {first:.0f} s"
    )
    words += f"; failed inside: {errors}" if errors else ""
    figures = {
        "plain_seconds": base,
        "plain_seconds_in_blocks": in_training,
        "unsampled_ratio": unsampled / base,
        "sampled_ratio": sampled / base,
        "ratios_of_single_steps": ratios,
        "ratio_in_blocks_every_10": real,
        "ratio_in_blocks_every_50_derived": every_50,
        "unsampled_excess_in_blocks": ahead,
        "blocks": blocks,
        "memory_above_plain": memory,
        "plain_peak": plain.peaks.get("unsampled", 0),
        "parameters": sum(each.numel() for each in plain.model.parameters()),
        "steps": reading,
        "errors": errors,
    }
    good = not errors and (place.small or every_50 <= LIMIT)
    return Found(good, words, figures)


def waits(place: Place, name: str, pairs: dict[str, tuple[Stepper, Stepper]]) -> Found:
    """How often a step makes the host wait, and where in stabmon."""
    if name not in pairs:
        raise Skipped("the models were not made")
    plain, watched = pairs.pop(name)
    place.need_cuda("counted by CUDA's debug mode")
    counts: dict[str, int] = {}
    places: dict[str, Counter[str]] = {}
    while not watched.monitor.is_sampled(watched.count + 1):
        watched.step()
    watched.step()  # the next is unsampled
    for kind, each in (("plain", plain), ("unsampled", watched), ("sampled", watched)):
        while kind == "sampled" and not each.monitor.is_sampled(each.count + 1):
            each.step()
        place.wait()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                each.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits_of = [one for one in told if "called a synchronizing" in str(one.message)]
        counts[kind] = len(waits_of)
        places[kind] = Counter(
            f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}" for one in waits_of
        )
    for each in (plain, watched):
        each.close()
    del plain, watched
    gc.collect()
    more = places["unsampled"] - places["plain"]
    words = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    words += f"; unsampled above plain at {dict(more)}" if more else ""
    limit = (
        counts["plain"] + 1
    )  # one for the look at losses, gradients and weights, as the documentation says
    return Found(
        counts["unsampled"] <= limit,
        words,
        {"counts": counts, "places": {k: dict(v) for k, v in places.items()}},
    )
