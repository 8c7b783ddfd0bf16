"""Plant an exception at each function of stabmon that runs on one rank, in a watched run."""

from __future__ import annotations

import logging
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import _get_current_function_mode_stack, _pop_mode

import stabmon
from tests.support.small_runs import Attention, weights

PACKAGE = str(Path(stabmon.__file__).parent)
LIBRARY = sysconfig.get_path("stdlib")
STEPS = 7


class Planted(RuntimeError):
    """The planted fault."""


class Tiny(nn.Module):
    """One attention layer and a head, ``[B, S, 32] -> [B, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.head = Attention(), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x)).mean(1))


def place_of(code: types.CodeType) -> str | None:
    """Return the name of a function of stabmon; None for others, and for code of a module."""
    if not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<module"):
        return None
    return f"{Path(code.co_filename).relative_to(PACKAGE).with_suffix('')}:{code.co_qualname}"


def is_entry(frame: types.FrameType) -> bool:
    """Return whether torch or the training loop calls this function, and not stabmon.

    What raises at the entry of such a function, before its first line, raises in its caller; they
    are hooks and methods that do nothing but call others within a boundary.
    """
    caller = frame.f_back
    while caller is not None:
        name = caller.f_code.co_filename
        if name.startswith(PACKAGE):
            return False
        in_library = name.startswith((LIBRARY, "<")) and "site-packages" not in name
        if not in_library:
            return True
        caller = caller.f_back
    return True


@contextmanager
def at_entries(act: Callable[[str], None], only: str | None = None) -> Iterator[None]:
    """Call a function at each entry of one of stabmon's functions, in this thread.

    An exception of it is raised at that entry, and nothing is called any more.

    Args:
        act: called with the function's place.
        only: call it at entries of this one alone.
    """
    known: dict[types.CodeType, str | None] = {}

    def trace(frame: types.FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if code not in known:
            place = place_of(code)
            known[code] = place if only is None or place == only else None
        place = known[code]
        if place is not None and not is_entry(frame):
            act(place)

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@dataclass
class Outcome:
    """What came of a run."""

    losses: list[float]
    weights: dict[str, Tensor]
    applied: list[str]
    lines: list[str] = field(default_factory=list)
    """Warnings and errors in the log."""
    fired: int = 0
    """Times that the fault was raised."""
    collectives: int = 0
    samples: int = 0
    left: list[str] = field(default_factory=list)
    """What stabmon has left in torch, the model or the optimizer after it was closed."""


class Lines(logging.Handler):
    """Keeps the lines that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def left_behind(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the hooks and modes that are there now, by kind."""
    held = {
        "function mode": _get_current_function_mode_stack(),
        "module hook": [
            hook
            for module in model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
            for hook in hooks.values()
        ],
        "parameter hook": [
            hook
            for each in model.parameters()
            for hook in (getattr(each, "_post_accumulate_grad_hooks", None) or {}).values()
        ],
        "optimizer hook": [
            *optimizer._optimizer_step_pre_hooks.values(),
            *optimizer._optimizer_step_post_hooks.values(),
        ],
    }
    return [kind for kind, found in held.items() for _ in found]


def run(
    config: str | None,
    plant: str | None,
    *,
    always: bool = False,
    rank: int = 1,
    trace: Callable[[str], None] | None = None,
    log_every: int = 1,
) -> Outcome:
    """Train a tiny model on this rank; W_q and W_k are blown up at step 4, so that guard acts.

    Args:
        config: the preset; None without stabmon.
        plant: place of the fault; None for none.
        always: plant it at each entry, not only at the first.
        rank: the rank that it is planted on.
        trace: called with each function of stabmon that is entered.
        log_every: interval of samples.
    """
    model = Tiny()
    called = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    outcome, log = Outcome([], {}, []), Lines()
    generator = torch.Generator().manual_seed(dist.get_rank())
    target = torch.arange(4) % 4

    def act(place: str) -> None:
        if trace is not None:
            trace(place)
        if place == plant and dist.get_rank() == rank and (always or not outcome.fired):
            outcome.fired += 1
            raise Planted(place)

    monitor: Any = None
    logger = logging.getLogger("stabmon")
    logger.addHandler(log)
    try:
        if config is not None:
            monitor = stabmon.AttentionStabilityMonitor(
                called,
                optimizer,
                config=config,
                sinks=[],
                log_every=log_every,
                reduce_ranks=True,
                schedule="fixed" if log_every > 1 else "adaptive",
            )
        with at_entries(act, plant) if plant or trace else nullcontext():
            for step in range(1, STEPS + 1):
                x = torch.randn(4, 6, 32, generator=generator)
                loss = nn.functional.cross_entropy(called(x), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step == 4:
                    with torch.no_grad():
                        model.attention.q.weight.mul_(60.0)
                        model.attention.k.weight.mul_(60.0)
                if monitor is not None:
                    monitor.on_step(loss)
                outcome.losses.append(float(loss.detach()))
            if monitor is not None:
                monitor.close()
    finally:
        logger.removeHandler(log)
    outcome.weights, outcome.lines = weights(model), log.lines
    outcome.left = left_behind(model, optimizer)
    while _get_current_function_mode_stack():  # else they slow down all later runs
        _pop_mode()
    if monitor is not None:
        outcome.applied = [each.intervention.name for each in monitor.applied]
        outcome.samples = len(monitor._tracker.history.readings)
        outcome.collectives = 0 if monitor._ranks is None else monitor._ranks.collectives
    return outcome


def same_weights(left: Outcome, right: Outcome) -> bool:
    """Return whether two runs ended with the same weights, bit for bit."""
    return all(torch.equal(left.weights[name], right.weights[name]) for name in left.weights)
