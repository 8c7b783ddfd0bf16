"""Compare training under "observe" with training without, bit for bit, on this device."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_checks.harness import Check, Found, Place, Skipped, bits_of, unequal
from gpu_checks.models import FAMILIES, tokens
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import stabmon

BATCH, LENGTH = 4, 128
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Variant:
    """One way to train."""

    family: str
    autocast: str | None = "bf16"
    backend: SDPBackend | None = None
    compiled: str | None = None
    checkpointing: bool = False
    optimizer: str = "fused"
    micro_batches: int = 1
    in_half: bool = False
    """Weights themselves in the autocast's format, and no autocast."""

    @property
    def name(self) -> str:
        """In words."""
        parts = [
            self.family,
            f"{self.autocast}{' weights' if self.in_half else ''}" if self.autocast else "fp32",
        ]
        parts += (
            [self.backend.name.lower().replace("_attention", "")]
            if self.backend is not None
            else []
        )
        parts += [f"compile {self.compiled}"] if self.compiled else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        return ", ".join([*parts, self.optimizer])


VARIANTS = (
    Variant("gpt2"),
    Variant("llama"),
    Variant("gpt2", "fp16"),
    Variant("llama", None, optimizer="foreach"),
    Variant("llama", "bf16", SDPBackend.FLASH_ATTENTION),
    Variant("gpt2", "bf16", SDPBackend.EFFICIENT_ATTENTION),
    Variant("llama", "bf16", SDPBackend.CUDNN_ATTENTION),
    Variant("gpt2", "bf16", SDPBackend.MATH),
    Variant("llama", "bf16", checkpointing=True),
    Variant("gpt2", "bf16", optimizer="capturable", micro_batches=2),
    Variant("llama", "bf16", in_half=True),
    Variant("gpt2", "bf16", compiled="default"),
    Variant("llama", "fp16", compiled="reduce-overhead"),
    Variant(
        "gpt2", "bf16", optimizer="graphed"
    ),  # last: a capture that fails may leave the device in a bad state
)


@dataclass
class Outcome:
    """What a run leaves."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    bits: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    readings: int = 0


def checks(place: Place) -> Iterator[Check]:
    """Every check of this section."""
    yield "a forward replayed, with dropout", functools.partial(replayed, place, False)
    for variant in VARIANTS:
        if variant.optimizer == "graphed":
            yield (
                "a compiled forward replayed, with dropout",
                functools.partial(replayed, place, True),
            )
        yield variant.name, functools.partial(compare, variant, place)


def replayed(place: Place, compiled: bool) -> Found:
    """A forward made again has the random numbers of the first, and leaves the generators alone."""
    from stabmon._torch.forward_call import ForwardCall

    if compiled:
        place.need_cuda("inductor's own random numbers are those of CUDA here")
    length = 32 if place.small else LENGTH
    model = FAMILIES["gpt2"](place, width=128 if place.small else 256, layers=2, length=length)
    called = torch.compile(model) if compiled else model
    batch = tokens(place, BATCH, length)
    given = {"input_ids": batch, "labels": batch}
    torch.manual_seed(5)
    torch.rand(3, device=place.device)
    call = ForwardCall.of(model, (), given)
    first = called(**given).loss.detach()
    generators = [torch.rand(2, device=place.device), torch.get_rng_state()]
    torch.manual_seed(5)
    torch.rand(3, device=place.device)
    called(**given)
    with call.again(model) as forward:
        second = forward().loss
    left = unequal(
        {"device": generators[0], "cpu": generators[1]},
        {"device": torch.rand(2, device=place.device), "cpu": torch.get_rng_state()},
    )
    off = float((first - second).abs())
    words = f"loss {float(first):.6f}, replayed {float(second):.6f}" + (
        f"; generators moved: {left}" if left else ""
    )
    return Found(off < 1e-4 and not left, words, {"difference": off})


def compare(variant: Variant, place: Place) -> Found:
    """Train twice without stabmon, to know that this run has one result, and once with it."""
    if variant.optimizer in ("capturable", "graphed"):
        place.need_cuda("capturable optimizers need a CUDA device")
    if variant.compiled == "reduce-overhead":
        place.need_cuda("CUDA graphs need a CUDA device")
    torch.use_deterministic_algorithms(True)
    note = ""
    try:
        first = train(variant, place, watched=False)
    except RuntimeError as error:
        if variant.backend is None:
            raise
        torch.use_deterministic_algorithms(False)
        note = ", without deterministic algorithms"
        try:
            first = train(variant, place, watched=False)
        except RuntimeError:
            raise Skipped(
                f"the plain run is not to be had here: {str(error).splitlines()[0][:120]}"
            ) from error
    second = train(variant, place, watched=False)
    noise = unequal(first.losses | first.bits, second.losses | second.bits)
    if noise:
        raise Skipped(
            f"the plain run is not deterministic{note}: {len(noise)} values, first {noise[0]}"
        )
    watched = train(variant, place, watched=True)
    changed = unequal(first.losses | first.bits, watched.losses | watched.bits)
    finite = sum(bool(loss.isfinite()) for loss in first.losses.values())
    compared = len(first.losses) + len(first.bits)
    words = f"{compared} values of {len(first.losses)} steps ({finite} finite losses), "
    words += f"{watched.readings} readings{note}"
    if changed:
        words = f"{len(changed)} of {words} DIFFER, first {', '.join(changed[:3])}"
    if watched.errors:
        words += f"; failed inside: {watched.errors}"
    passed = not changed and not watched.errors and watched.readings > 0
    return Found(
        passed,
        words,
        {"changed": changed[:20], "errors": watched.errors, "readings": watched.readings},
    )


def train(variant: Variant, place: Place, watched: bool) -> Outcome:
    """Train one run from a fixed random state."""
    if variant.compiled:
        torch._dynamo.reset()
    steps = 8 if place.small else 24
    length = 32 if place.small else LENGTH
    model = FAMILIES[variant.family](
        place, width=128 if place.small else 256, layers=2, length=length, dropout=0.1
    )
    dtype = DTYPES.get(variant.autocast or "")
    if variant.in_half:
        model.to(dtype)
    if variant.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    called: nn.Module = model
    if variant.compiled:
        backend = {} if place.is_cuda else {"backend": "aot_eager"}
        called = torch.compile(model, mode=None if backend else variant.compiled, **backend)
    optimizer = make_optimizer(variant, model, place)
    scaler = torch.amp.GradScaler(
        place.device.type, enabled=variant.autocast == "fp16" and not variant.in_half
    )
    outcome = Outcome()
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if variant.backend is not None:
            stack.enter_context(sdpa_kernel(variant.backend))
        monitor = None
        if watched:
            monitor = stabmon.AttentionStabilityMonitor(
                called, optimizer, config="observe", log_every=4, sinks=["jsonl"], run_dir=folder
            )
        autocast = functools.partial(
            torch.autocast,
            place.device.type,
            dtype,
            enabled=dtype is not None and not variant.in_half,
        )
        graph: Any = None
        for step in range(1, steps + 1):
            total = torch.zeros((), device=place.device)
            for part in range(variant.micro_batches):
                batch = tokens(place, BATCH, length, seed=100 * step + part)
                if variant.compiled == "reduce-overhead":
                    torch.compiler.cudagraph_mark_step_begin()
                with autocast():
                    loss = called(input_ids=batch, labels=batch).loss / variant.micro_batches
                scaler.scale(loss).backward()
                total = total + loss.detach()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if variant.optimizer == "graphed" and step >= 4:
                graph = graph or capture(optimizer)
                graph.replay()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=variant.optimizer != "graphed")
            outcome.losses[f"loss {step:02d}"] = total.clone()
            if monitor is not None:
                diagnosis = monitor.on_step(loss=total)
                outcome.readings += bool(diagnosis and diagnosis.stats)
        outcome.bits = bits_of(model, optimizer, place)
        if monitor is not None:
            outcome.errors = dict(monitor.errors)
            monitor.close()
    return outcome


def make_optimizer(variant: Variant, model: nn.Module, place: Place) -> torch.optim.Optimizer:
    """AdamW in the way that the variant names."""
    options: dict[str, Any] = {variant.optimizer: True}
    if variant.optimizer in ("capturable", "graphed"):
        options = {"capturable": True, "lr": torch.tensor(1e-3, device=place.device)}
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})


def capture(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer's step as a CUDA graph; its first three steps were the warm-up."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph
