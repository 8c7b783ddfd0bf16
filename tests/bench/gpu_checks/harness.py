"""Run named checks one by one, survive each, and keep their figures."""

from __future__ import annotations

import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

TRACE_LINES = 6
"""Last lines of a traceback that are printed."""


class Skipped(Exception):
    """The check does not apply here; its words say why."""


@dataclass(frozen=True)
class Place:
    """Where the checks run."""

    device: torch.device
    small: bool
    """Reduced sizes, for a test of the checks themselves on a CPU."""
    deadline: float
    """In seconds of ``time.monotonic``."""

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    @property
    def is_cuda(self) -> bool:
        """Whether this is a CUDA device."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait for all work that was given to the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def need_cuda(self, why: str = "needs a CUDA device") -> None:
        """Skip the check elsewhere.

        Raises:
            Skipped: if this is no CUDA device.
        """
        if not self.is_cuda:
            raise Skipped(why)


@dataclass(frozen=True)
class Found:
    """The result of a check."""

    passed: bool
    words: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    name: str
    result: str
    """PASS, FAIL or SKIP."""
    words: str
    seconds: float
    figures: Mapping[str, Any] = field(default_factory=dict)
    trace: str = ""

    def line(self) -> str:
        """The row as text; a failing one with the end of its traceback."""
        text = (
            f"{self.section:<12}{self.name:<50} {self.result:<5}{self.seconds:6.1f} s  {self.words}"
        )
        return "\n".join(
            [text, *(f"            | {line}" for line in self.trace.splitlines()[-TRACE_LINES:])]
        )

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return finite(asdict(self))


Check = tuple[str, Callable[[], Found]]


def run(section: str, checks: Callable[[Place], Iterator[Check]], place: Place) -> Iterator[Row]:
    """Run every check of a section; none stops the others."""
    listed = checks(place)
    while True:
        try:
            name, check = next(listed)
        except StopIteration:
            return
        except Exception as error:
            yield _failed(section, "set-up", error, 0.0)
            return
        began = time.monotonic()
        if place.left() <= 0:
            yield Row(section, name, "SKIP", "the time of this section is used up", 0.0)
            continue
        try:
            found = check()
            place.wait()
            seconds = time.monotonic() - began
            yield Row(
                section,
                name,
                "PASS" if found.passed else "FAIL",
                found.words,
                seconds,
                found.figures,
            )
        except Skipped as why:
            yield Row(section, name, "SKIP", str(why), time.monotonic() - began)
        except Exception as error:
            yield _failed(section, name, error, time.monotonic() - began)
        if not _clean_up(place):
            yield Row(
                section,
                "device",
                "FAIL",
                f"the CUDA context is lost after {name!r}: the rest is not run",
                0.0,
            )
            return


def _failed(section: str, name: str, error: Exception, seconds: float) -> Row:
    words = " ".join(str(error).split())[:200]
    trace = "".join(traceback.format_exception(error)).rstrip()
    return Row(section, name, "FAIL", f"{type(error).__name__}: {words}", seconds, {}, trace)


def _clean_up(place: Place) -> bool:
    """Put global switches back and free memory; whether the device still answers."""
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    if "torch._dynamo" in sys.modules:  # not loaded for this: stabmon looks at whether it is
        torch._dynamo.reset()
    gc.collect()
    if not place.is_cuda:
        return True
    try:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool(torch.ones(1, device=place.device).item() == 1)
    except Exception:
        return False


def finite(value: Any) -> Any:
    """The value with NaN and infinities, and what JSON cannot hold, as strings."""
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, str | int | bool) or value is None else str(value)


def same_bits(left: Any, right: Any) -> bool:
    """Whether two values, tensors among them, are equal to the last bit."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape or left.device != right.device:
            return False
        pair = [each.detach().reshape(-1).contiguous().view(torch.uint8) for each in (left, right)]
        return torch.equal(*pair)
    return bool(left == right)


def unequal(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same to the last bit in two states."""
    return [
        name
        for name in sorted(left.keys() | right.keys())
        if not same_bits(left.get(name), right.get(name))
    ]


def bits_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, place: Place
) -> dict[str, Any]:
    """Copy parameters, buffers, optimizer state, group settings and random states, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    bits: dict[str, Any] = {name: tensor.detach().clone() for name, tensor in named}
    for at, group in enumerate(optimizer.param_groups):
        settings = {name: value for name, value in group.items() if name != "params"}
        bits |= {
            f"group {at} {k}": v.clone() if isinstance(v, Tensor) else v
            for k, v in settings.items()
        }
        for each, parameter in enumerate(group["params"]):
            for k, v in optimizer.state.get(parameter, {}).items():
                bits[f"state {at}.{each} {k}"] = v.detach().clone() if isinstance(v, Tensor) else v
    bits["random numbers, cpu"] = torch.get_rng_state()
    if place.is_cuda:
        bits["random numbers, cuda"] = torch.cuda.get_rng_state()
    return bits
