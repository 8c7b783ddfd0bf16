"""Provoke faults under guard: alarms, interventions, final losses, undo, and resume."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import guard_rates as rates
import torch
from gpu_checks.harness import Check, Found, Place, Skipped, bits_of, unequal
from testbed.inject_fault import FAULTS as INJECTED
from torch import nn

import stabmon

RATE, EVERY, TAIL, MARGIN = 3.6e-3, 5, 30, 0.15
"""Learning rate (about the right one), sampling interval, steps averaged for a final loss, and nats
by which guard may end above doing nothing. At 10 times the rate, a capped rate learns more slowly
in runs as short as these: by 0.06 to 0.14 nats on a CPU."""
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "growing W_q and W_k": (
        "scale_query_key",
        {"factor": 1.03, "start": 80, "steps": 1000, "layers": None},
    ),
    "10 times the rate": ("rate", {"factor": 10.0, "start": 1, "over": 1, "steps": 10**6}),
    "30 times the rate": ("rate", {"factor": 30.0, "start": 1, "over": 1, "steps": 10**6}),
    "rate jumps by 30": ("rate", {"factor": 30.0, "start": 90, "over": 1, "steps": 10**6}),
}


@dataclass
class Run:
    """A model in training on bytes, with a fault, watched or not."""

    place: Place
    fault: str = "none"
    config: str | None = None
    optimizer_options: dict[str, Any] = field(default_factory=lambda: {"fused": True})
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = rates._fresh().to(self.place.device)
        options: dict[str, Any] = {"lr": RATE, **self.optimizer_options}
        if isinstance(options["lr"], torch.Tensor):
            options["lr"] = options["lr"].clone()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)
        kind, settings = FAULTS[self.fault]
        self.fault_now = INJECTED[kind](self.model, self.optimizer, **settings)
        self.data = torch.Generator().manual_seed(100)
        self.losses: list[float] = []
        self.monitor: Any = None
        if self.config is not None:
            given = {"log_every": EVERY, "sinks": []} | self.options
            self.monitor = stabmon.AttentionStabilityMonitor(
                self.model, self.optimizer, config=self.config, **given
            )

    def step(self, tell: bool = True) -> Any:
        """One optimizer step; without ``tell`` the monitor is told of it later."""
        number = len(self.losses) + 1
        batch = rates._batch("topics", self.data).to(self.place.device)
        warm = min(1.0, number / 20) * self.fault_now.rate_factor(number)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(RATE * warm)
            else:
                group["lr"] = RATE * warm
        self.optimizer.zero_grad()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.fault_now.before_step(number)
        self.optimizer.step()
        self.fault_now.after_step(number)
        self.losses.append(float(loss.detach()))
        return self.monitor.on_step(loss=loss) if self.monitor is not None and tell else None

    def steps(self, count: int) -> Run:
        """Several of them."""
        for _ in range(count):
            self.step()
        return self

    @property
    def final(self) -> float:
        """Mean of the last losses; inf where one is not finite."""
        last = self.losses[-TAIL:]
        return fmean(last) if all(map(math.isfinite, last)) else math.inf


def checks(place: Place) -> Iterator[Check]:
    """Every check of this section."""
    steps = 150 if place.small else 240
    final: dict[str, float] = {}
    for fault in FAULTS:
        yield f"guard: {fault}", functools.partial(guarded, place, fault, steps, final)
    yield "undo, fused AdamW", functools.partial(undo, place, {"fused": True})
    yield "undo, foreach AdamW", functools.partial(undo, place, {"foreach": True})
    yield (
        "undo, capturable AdamW with a rate on the device",
        functools.partial(undo_capturable, place),
    )
    yield "rollback before the first step, fused AdamW", functools.partial(first_state, place)
    yield "saved and resumed", functools.partial(resumed, place)


def guarded(place: Place, fault: str, steps: int, final: dict[str, float]) -> Found:
    """The same run without stabmon and under guard."""
    without = Run(place, fault).steps(steps)
    under = Run(place, fault, "guard").steps(steps)
    monitor = under.monitor
    final[fault] = without.final
    alarms = [issue for issue in monitor.issues if issue.is_alarm]
    acts = [
        f"{each.intervention.name}@{each.step}" for each in monitor.applied if each.step > 0
    ]  # one stands from the start
    errors = dict(monitor.errors)
    monitor.close()
    words = f"loss {without.final:.3f} without, {under.final:.3f} under guard, "
    words += f"{final.get('none', math.nan):.3f} healthy; "
    words += f"{len(alarms)} alarms" + (
        f", first {alarms[0].issue_type}@{alarms[0].step}" if alarms else ""
    )
    words += f"; acts {', '.join(acts[:6]) or 'none'}" + (
        f"; failed inside: {errors}" if errors else ""
    )
    no_worse = under.final <= without.final + MARGIN or math.isinf(without.final)
    told = bool(alarms) and bool(acts) if fault != "none" else not acts
    figures = {
        "without": without.final,
        "guard": under.final,
        "alarms": [i.to_dict() for i in alarms[:20]],
        "acts": acts,
    }
    return Found(no_worse and told and not errors, words, figures | {"errors": errors})


def undo(place: Place, optimizer: dict[str, Any]) -> Found:
    """Apply every intervention of guard by hand, undo it, compare every bit, and train on."""
    run = Run(place, "growing W_q and W_k", "guard", optimizer, {"budget": {"acts": 0}})
    alarm = None
    for _ in range(160):
        diagnosis = run.step()
        issues = [
            issue
            for issue in (diagnosis.open_issues if diagnosis else ())
            if issue.is_alarm and issue.layer
        ]
        if issues:
            alarm = issues[0]
            break
    if alarm is None:
        raise Skipped("no alarm came")
    before = bits_of(run.model, run.optimizer, place)
    wrong, applied_names, refused = [], [], []
    for name, act in stabmon.load_config("guard").make_interventions().items():
        applied = run.monitor.apply(act.aimed_at([alarm]))
        if applied is None:
            refused.append(name)
            continue
        changed = unequal(before, bits_of(run.model, run.optimizer, place))
        applied.undo()
        left = unequal(before, bits_of(run.model, run.optimizer, place))
        applied_names.append(f"{name} ({len(changed)} changed)")
        if left:
            wrong.append(f"{name}: {len(left)} values, first {', '.join(left[:3])}")
    run.steps(3)  # the optimizer goes on with what was put back
    errors = dict(run.monitor.errors)
    run.monitor.close()
    words = f"alarm {alarm.issue_type}@{run.monitor.step - 3}; "
    words += f"undone: {', '.join(applied_names) or 'none'}"
    words += f"; refused: {', '.join(refused)}" if refused else ""
    words += f"; NOT UNDONE: {'; '.join(wrong)}" if wrong else ""
    words += f"; failed inside: {errors}" if errors else ""
    good = (
        not wrong
        and bool(applied_names)
        and not errors
        and all(map(math.isfinite, run.losses[-3:]))
    )
    return Found(
        good,
        words,
        {"applied": applied_names, "refused": refused, "wrong": wrong, "errors": errors},
    )


def undo_capturable(place: Place) -> Found:
    """The same where the optimizer keeps its step and its rate in tensors on the device."""
    place.need_cuda("capturable optimizers need a CUDA device")
    return undo(place, {"capturable": True, "lr": torch.tensor(RATE, device=place.device)})


def first_state(place: Place) -> Found:
    """Restore a state without optimizer entries, then one with them, and compare every bit."""
    from stabmon.interventions import TrainingRun
    from stabmon.interventions.run.snapshots import Snapshot

    run = Run(place, optimizer_options={"fused": True})
    training = TrainingRun(run.model, run.optimizer)
    fresh = Snapshot.take(training)
    run.steps(3)
    later, bits = Snapshot.take(training), bits_of(run.model, run.optimizer, place)
    fresh.restore(training, schedule=True)
    later.restore(training, schedule=True)
    changed = [
        name
        for name in unequal(bits, bits_of(run.model, run.optimizer, place))
        if "random" not in name
    ]
    run.steps(2)
    return Found(
        not changed,
        f"{len(changed)} of {len(bits)} values differ: {', '.join(changed[:3])}",
        {"changed": changed[:20]},
    )


def resumed(place: Place) -> Found:
    """Save everything half-way and resume: bit for bit as without a break."""
    torch.use_deterministic_algorithms(True)
    fault, half, rest = "growing W_q and W_k", 110, 40
    whole = Run(place, fault, "guard").steps(half)
    stream = io.BytesIO()
    saved = {
        "model": whole.model.state_dict(),
        "optimizer": whole.optimizer.state_dict(),
        "monitor": whole.monitor.state_dict(),
    }
    torch.save(saved, stream)
    generator, losses = whole.data.get_state(), list(whole.losses)
    open_then = [copy.copy(issue) for issue in whole.monitor.open_issues]
    whole.steps(rest)
    stream.seek(0)
    state = torch.load(stream, map_location=place.device, weights_only=False)
    other = Run(place, fault, "guard")
    other.model.load_state_dict(state["model"])
    other.optimizer.load_state_dict(state["optimizer"])
    other.monitor.load_state_dict(state["monitor"])
    other.data.set_state(generator)
    other.losses = losses
    other.steps(rest)
    pair = [bits_of(each.model, each.optimizer, place) for each in (whole, other)]
    changed = [name for name in unequal(*pair) if "random" not in name]
    issues = [[issue.to_dict() for issue in each.monitor.issues] for each in (whole, other)]
    acts = [[a.intervention.name for a in each.monitor.applied] for each in (whole, other)]
    errors = dict(whole.monitor.errors) | dict(other.monitor.errors)
    for each in (whole, other):
        each.monitor.close()
    words = f"{len(changed)} of {len(pair[0])} values differ after {rest} more steps; "
    words += f"{len(open_then)} issues were open; "
    words += f"issues {len(issues[0])} and {len(issues[1])}; acts {acts[0]} and {acts[1]}"
    words += f"; first {', '.join(changed[:3])}" if changed else ""
    words += f"; failed inside: {errors}" if errors else ""
    return Found(
        not changed and not errors and len(issues[0]) == len(issues[1]),
        words,
        {"changed": changed[:20]},
    )
