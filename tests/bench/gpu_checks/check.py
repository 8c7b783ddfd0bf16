"""Compare the check, the analyzer, the analyses and the controllers with the same on the CPU."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

import stabmon
from stabmon.analysis import (
    attention_patterns,
    attention_rollout,
    compute_attention_attribution,
    simulate_cake,
)
from stabmon.controllers import CONTROLLERS, attach_controllers, detach_controllers
from tests.bench.gpu_checks.harness import Check, Found, Place
from tests.bench.gpu_checks.models import FAMILIES, tokens

LENGTH, BATCH = 96, 2
AIM = 1e-3
"""Largest difference between the devices over max(1, |value|), in float32."""
BITS_AIM = 1e-2
"""The same for bits that are measured by rounding: a query or key that differs in its last digit
may be rounded to the other side, which moves a probability by a step.
"""


def checks(place: Place) -> Iterator[Check]:
    """Every check of this section."""
    for family in FAMILIES:
        yield f"check_attention_stability {family}", functools.partial(stability, place, family)
        yield f"AttentionAnalyzer {family}", functools.partial(analyzer, place, family)
        yield f"attention_rollout {family}", functools.partial(rollout, place, family)
        yield f"attention_patterns {family}", functools.partial(patterns, place, family)
        yield f"simulate_cake {family}", functools.partial(cake, place, family)
        yield f"attribution {family}", functools.partial(attribution, place, family)
    yield "AttentionAnalyzer llama, bf16 weights and padding", functools.partial(half, place)
    for name in CONTROLLERS:
        for family in FAMILIES:
            yield (
                f"controllers {name} {family}",
                functools.partial(controllers, place, name, family),
            )


def pair(place: Place, family: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """The same sharp model on the CPU and on the device, and a batch for each."""
    host = FAMILIES[family](
        Place(torch.device("cpu"), place.small, place.deadline), length=LENGTH * 2, dropout=0.0
    )
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    there = copy.deepcopy(host).to(place.device)
    ids = tokens(place, BATCH, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    return host, there, {name: value.cpu() for name, value in batch.items()}, batch


def numbers(value: Any, at: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Every number in nested mappings, sequences, tensors and arrays, with its place."""
    if isinstance(value, torch.Tensor):
        value = (
            value.detach().cpu().double().numpy()
            if value.is_floating_point()
            else value.cpu().numpy()
        )
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "fiub":
            yield at, value.astype(np.float64)
    elif isinstance(value, bool | int | float):
        yield at, np.asarray(float(value))
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from numbers(each, f"{at}.{name}")
    elif isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from numbers(each, f"{at}.{number}")


def compared(host: Any, there: Any, aim: float = AIM) -> Found:
    """A result from the same thing on two devices."""
    wanted, found = dict(numbers(host)), dict(numbers(there))
    if wanted.keys() != found.keys():
        return Found(False, f"other entries: {sorted(wanted.keys() ^ found.keys())[:5]}")
    worst, where, count = 0.0, "", 0
    for name, truth in wanted.items():
        got = found[name]
        if got.shape != truth.shape:
            return Found(False, f"{name} has shape {got.shape}, on the CPU {truth.shape}")
        same = (got == truth) | (np.isnan(got) & np.isnan(truth))
        with np.errstate(invalid="ignore"):
            error = np.where(same, 0.0, np.abs(got - truth) / np.maximum(1.0, np.abs(truth)))
        largest = float(np.nan_to_num(error, nan=math.inf).max(initial=0.0))
        count += truth.size
        if largest > worst or not where:
            worst, where = largest, name
    return Found(
        count > 0 and worst <= aim,
        f"{count} values, worst difference {worst:.1e} at {where}",
        {"worst": worst},
    )


def stability(place: Place, family: str) -> Found:
    """The check before training, of its numbers, and what it leaves of the model."""
    host, there, on_host, batch = pair(place, family)
    reports = []
    names = (
        "expected_logit_max",
        "curvature_bound",
        "precision_bits_needed",
        "float16_safe",
        "bfloat16_safe",
    )
    before = {name: value.clone() for name, value in there.state_dict().items()}
    for model, given in ((host, on_host), (there, batch)):
        report = stabmon.check_attention_stability(model, {**given, "labels": given["input_ids"]})
        report.to_markdown()
        reports.append(
            {name: report[name] for name in names}
            | {"recommendations": len(report["recommendations"])}
        )
    bits = [{"bits": report.pop("precision_bits_needed")} for report in reports]
    found, of_bits = compared(*reports), compared(*bits, aim=BITS_AIM)
    touched = [
        name for name, value in there.state_dict().items() if not torch.equal(value, before[name])
    ]
    grads = [name for name, each in there.named_parameters() if each.grad is not None]
    if touched or grads:
        return Found(False, f"the model is not as it was: {(touched + grads)[:3]}")
    return Found(
        found.passed and of_bits.passed,
        f"{found.words}; bits: {of_bits.words}; largest score expected {reports[1]['expected_logit_max']:.3g}",
        found.figures,
    )


def analyzer(place: Place, family: str) -> Found:
    """Statistics of a forward without gradients."""
    host, there, on_host, batch = pair(place, family)
    return compared(analysed(host, on_host), analysed(there, batch))


def analysed(model: Any, batch: Mapping[str, Any], **more: Any) -> Any:
    """``stats`` of one forward."""
    with stabmon.AttentionAnalyzer(model.eval(), **more) as looking:
        with torch.no_grad():
            model(**batch)
        return looking.diagnose().stats


def half(place: Place) -> Found:
    """A model in bfloat16 on the device: the fused engine against the oracle on the same calls."""
    _, there, _, batch = pair(place, "llama")
    there.to(torch.bfloat16)
    return compared(analysed(there, batch, engine="dense"), analysed(there, batch))


def on_both(
    place: Place, family: str, make: Callable[[Any, dict[str, Any]], Any], aim: float = AIM
) -> Found:
    """Compare what ``make`` gives on the two devices."""
    host, there, on_host, batch = pair(place, family)
    return compared(make(host.eval(), on_host), make(there.eval(), batch), aim)


def rollout(place: Place, family: str) -> Found:
    """Plain, and with gradients."""

    def make(model: Any, batch: dict[str, Any]) -> Any:
        plain = attention_rollout(model, batch)
        weighted = attention_rollout(model, batch, targets=[LENGTH - 1], weighting="gradient")
        return {
            "matrix": plain.matrix,
            "first_token_share": plain.first_token_share,
            "gradient": weighted.matrix,
        }

    return on_both(place, family, make)


def patterns(place: Place, family: str) -> Found:
    """Statistics of every head; roles are compared by their number that agree."""
    roles: list[list[str]] = []

    def make(model: Any, batch: dict[str, Any]) -> Any:
        found = attention_patterns(model, batch)
        roles.append([role.role for role in found.roles])
        return found.statistics

    result = on_both(place, family, make)
    alike = sum(a == b for a, b in zip(*roles, strict=True))
    words = f"{result.words}; {alike} of {len(roles[0])} roles alike"
    return Found(result.passed and alike == len(roles[0]), words, result.figures)


def cake(place: Place, family: str) -> Found:
    """Budgets and dispersion, the keys that stay, and the perplexity of decoding with the cache."""

    def make(model: Any, batch: dict[str, Any]) -> Any:
        plain = simulate_cake(model, batch, cache_size=48, window_size=8)
        decoded = simulate_cake(
            model, {"input_ids": batch["input_ids"]}, cache_size=48, window_size=8, max_new_tokens=6
        )
        layers = [
            {"budget": each.budget, "dispersion": each.dispersion, "preference": each.preference}
            for each in plain.layers
        ]
        return {"layers": layers, "tokens": decoded.tokens, "perplexity": decoded.perplexity}

    return on_both(place, family, make, 1e-2)


def attribution(place: Place, family: str) -> Found:
    """The summary of one layer."""
    return on_both(
        place, family, lambda model, batch: dict(compute_attention_attribution(model, batch))
    )


def controllers(place: Place, name: str, family: str) -> Found:
    """Attach, train on both devices from the same state, compare, detach."""
    host, there, on_host, batch = pair(place, family)
    losses, counts = [], []
    for model, given in ((host, on_host), (there, batch)):
        torch.manual_seed(0)
        made = attach_controllers(model, name)
        counts.append(sum(each.numel() for each in made.parameters()))
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(trained, 1e-2)
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(**given, labels=given["input_ids"]).loss
            loss.backward()
            optimizer.step()
            seen.append(loss.detach().cpu())
        if (
            any(each.device.type != place.device.type for each in made.parameters())
            and model is there
        ):
            return Found(False, "controllers do not lie on the model's device")
        with torch.autocast(place.device.type if model is there else "cpu", torch.bfloat16):
            model(**given, labels=given["input_ids"]).loss.backward()
        if not all(
            bool(each.grad.isfinite().all()) for each in made.parameters() if each.grad is not None
        ):
            return Found(False, "a gradient under bf16 autocast is not finite")
        detach_controllers(model)
        losses.append(torch.stack(seen))
    found = compared(*losses)
    return Found(
        found.passed,
        f"{counts[0]} parameters; losses {losses[1].tolist()}; {found.words}",
        found.figures,
    )
