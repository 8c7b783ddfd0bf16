"""Compare per-head statistics of every engine with a float64 oracle, and measure their memory."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import stabmon
from stabmon.operator import attention_operator
from stabmon.signals import measure
from tests.bench.gpu_checks.harness import Check, Found, Place, Skipped

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ENGINES = ("fused", "blockwise", "auto")
AIM = 1e-3
"""Largest deviation from the oracle over max(1, |value|); most should be below 1e-4."""
SIGNALS = tuple(stabmon.StabilityConfig().signals)
Options = Callable[[int, int, int, torch.device], Mapping[str, Any]]


def _left_padding(batch: int, heads: int, length: int, device: torch.device) -> dict[str, Any]:
    mask = torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)
    mask[0, ..., : length // 4] = False
    return {"is_causal": True, "mask": mask}


def _additive(batch: int, heads: int, length: int, device: torch.device) -> dict[str, Any]:
    """Causality and padding on the right as transformers hands them to eager attention."""
    hidden = (
        torch.ones(length, length, dtype=torch.bool, device=device)
        .triu(1)
        .expand(batch, 1, -1, -1)
        .clone()
    )
    hidden[0, ..., -length // 4 :] = True
    return {
        "mask": torch.zeros(hidden.shape, device=device).masked_fill(
            hidden, torch.finfo(torch.float32).min
        )
    }


def _bias(batch: int, heads: int, length: int, device: torch.device) -> dict[str, Any]:
    back = torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
    slopes = 2.0 ** -torch.arange(1, heads + 1, device=device)
    return {"is_causal": True, "mask": (slopes[:, None, None] * back)[None]}


CASES: dict[str, Options] = {
    "full": lambda b, h, s, d: {},
    "causal": lambda b, h, s, d: {"is_causal": True},
    "left padding": _left_padding,
    "additive mask": _additive,
    "window": lambda b, h, s, d: {"is_causal": True, "window": s // 8},
    "softcap": lambda b, h, s, d: {"is_causal": True, "softcap": 20.0},
    "bias": _bias,
    "sinks": lambda b, h, s, d: {"is_causal": True, "sinks": torch.linspace(-1, 4, h, device=d)},
}
HEADS = 4


def checks(place: Place) -> Iterator[Check]:
    """Every check of this section."""
    yield "kernels proven", functools.partial(kernels, place)
    lengths = (64,) if place.small else (512, 2048)
    for length in lengths:
        for name in DTYPES:
            for head_dim in (64, 128):
                cases = list(CASES) if length <= 512 else ["causal", "left padding", "window"]
                for_one = functools.partial(
                    statistics, place, DTYPES[name], head_dim, length, cases
                )
                yield f"statistics {name} D={head_dim} S={length}", for_one
    yield (
        "log-partition of rows, powers 1 to 3",
        functools.partial(partitions, place, 64 if place.small else 1024),
    )
    yield "A x and A^T y", functools.partial(products, place, 64 if place.small else 1024)
    long = 256 if place.small else 8192
    for name in DTYPES:
        yield (
            f"fused against blockwise {name} S={long}",
            functools.partial(agreement, place, DTYPES[name], long),
        )
    yield "under TF32 (matmul precision 'high')", functools.partial(under_tf32, place)
    yield "under deterministic algorithms", functools.partial(deterministic, place)
    length = 1024 if place.small else 32768
    for engine in ("fused", "blockwise"):
        yield (
            f"memory and time at S={length}, {engine}",
            functools.partial(memory, place, engine, length),
        )
    yield "flex kernel (the last resort)", functools.partial(flex, place)


def inputs(
    place: Place,
    dtype: torch.dtype,
    head_dim: int,
    length: int,
    key_heads: int = HEADS,
    batch: int = 2,
    heads: int = HEADS,
) -> tuple[Tensor, Tensor]:
    """Query and key with the strides that models give them; heads from flat to sharp."""
    generator = torch.Generator().manual_seed(length + head_dim)
    query = (
        torch.randn(batch, length, heads, head_dim, generator=generator)
        * torch.linspace(0.5, 4, heads)[:, None]
    )
    key = torch.randn(batch, length, key_heads, head_dim, generator=generator)
    return query.to(place.device, dtype).transpose(1, 2), key.to(place.device, dtype).transpose(
        1, 2
    )


def per_head(
    query: Tensor, key: Tensor, options: Mapping[str, Any], engine: str
) -> dict[str, Tensor]:
    """Signal -> one value a head, float64 on the CPU."""
    operator = attention_operator(
        query, key, scale=query.shape[-1] ** -0.5, engine=engine, **options
    )
    return {
        name: each.value.double().cpu() for name, each in measure(operator, list(SIGNALS)).items()
    }


def deviation(found: Tensor, wanted: Tensor) -> float:
    """Largest |found - wanted| / max(1, |wanted|); inf where not finite and unequal."""
    alike = (found == wanted) | (found.isnan() & wanted.isnan())
    error = torch.where(alike, 0.0, (found - wanted).abs() / wanted.abs().clamp(min=1))
    return error.nan_to_num(float("inf")).max().item()


def worst_of(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    rows: int,
    label: str,
    into: dict[str, float],
) -> None:
    """Enter the deviation of every signal; a fraction of rows may be two rows off."""
    for name, truth in wanted.items():
        error = deviation(found[name], truth)
        into[f"{label}, {name}"] = (
            max(0.0, error - 2 / rows) if name == "saturated_fraction" else error
        )


def told(errors: Mapping[str, float], aim: float = AIM) -> Found:
    """A result from deviations by name."""
    worst = sorted(errors, key=lambda name: -errors[name])[:8]
    words = f"worst {errors[worst[0]]:.1e} at {worst[0]} (aim {aim:.0e}); {len(errors)} compared"
    return Found(errors[worst[0]] <= aim, words, {name: errors[name] for name in worst})


def statistics(
    place: Place, dtype: torch.dtype, head_dim: int, length: int, cases: list[str]
) -> Found:
    """Every engine against the oracle in float64, with and without grouped heads."""
    errors: dict[str, float] = {}
    for key_heads in (HEADS, HEADS // 2):
        query, key = inputs(place, dtype, head_dim, length, key_heads)
        for case in cases:
            options = CASES[case](2, HEADS, length, place.device)
            wanted = per_head(query, key, options, "dense")
            if length <= 512:  # the oracle itself, by the CPU
                host = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
                on_host = per_head(query.cpu(), key.cpu(), host, "dense")
                worst_of(
                    wanted,
                    on_host,
                    2 * length,
                    f"{case}, H_kv={key_heads}, dense on both devices",
                    errors,
                )
            for engine in ENGINES:
                found = per_head(query, key, options, engine)
                worst_of(found, wanted, 2 * length, f"{case}, H_kv={key_heads}, {engine}", errors)
    return told(errors)


def partitions(place: Place, length: int) -> Found:
    """The rows' own log-partitions: where a kernel's logsumexp would be wrong first."""
    errors: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        for head_dim in (64, 128):
            query, key = inputs(place, dtype, head_dim, length, HEADS // 2)
            for case in ("full", "causal", "left padding", "window"):
                options = CASES[case](2, HEADS, length, place.device)
                made = [
                    attention_operator(query, key, scale=head_dim**-0.5, engine=engine, **options)
                    for engine in ("fused", "dense")
                ]
                for power in (1, 2, 3):
                    pair = [each.log_partition(power).double() for each in made]
                    errors[f"{name}, D={head_dim}, {case}, power {power}"] = deviation(*pair)
    return told(errors)


def products(place: Place, length: int) -> Found:
    """Products with the matrix and its transpose."""
    errors: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        query, key = inputs(place, dtype, 64, length, HEADS // 2)
        x = torch.randn(2, HEADS, length, 80, generator=torch.Generator().manual_seed(1)).to(
            place.device
        )
        for case in ("causal", "left padding", "softcap"):
            options = CASES[case](2, HEADS, length, place.device)
            oracle = attention_operator(query, key, scale=0.125, engine="dense", **options)
            for engine in ("fused", "blockwise"):
                operator = attention_operator(query, key, scale=0.125, engine=engine, **options)
                errors[f"{name}, {case}, {engine}, A x"] = deviation(
                    operator.matvec(x).double(), oracle.matvec(x)
                )
                errors[f"{name}, {case}, {engine}, A^T y"] = deviation(
                    operator.rmatvec(x).double(), oracle.rmatvec(x)
                )
    return told(errors)


def agreement(place: Place, dtype: torch.dtype, length: int) -> Found:
    """Two engines at a length at which no oracle fits."""
    errors: dict[str, float] = {}
    query, key = inputs(place, dtype, 64, length, 2, batch=1)
    for case in ("causal", "window", "left padding"):
        options = CASES[case](1, HEADS, length, place.device)
        wanted = per_head(query, key, options, "blockwise")
        worst_of(per_head(query, key, options, "fused"), wanted, length, case, errors)
    return told(errors)


def under_tf32(place: Place) -> Found:
    """Measure under TF32, which training scripts turn on for speed: no digits may be lost to it."""
    place.need_cuda("TF32 is a mode of CUDA devices")
    query, key = inputs(place, torch.float32, 64, 512)
    options = {"is_causal": True}
    wanted = per_head(query, key, options, "dense")
    errors: dict[str, float] = {}
    torch.set_float32_matmul_precision("high")
    _forget_proofs()
    for engine in ("blockwise", "fused"):
        worst_of(per_head(query, key, options, engine), wanted, 1024, engine, errors)
    kernel = _proven(place, 64, torch.float32)
    _forget_proofs()
    found = told(errors)
    return Found(found.passed, f"{found.words}; kernel proven under TF32: {kernel}", found.figures)


def deterministic(place: Place) -> Found:
    """No operation of a measurement may be one that raises under deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    _forget_proofs()
    errors: dict[str, float] = {}
    query, key = inputs(place, torch.bfloat16, 64, 256, 2)
    for case, options_of in CASES.items():
        options = options_of(2, HEADS, 256, place.device)
        wanted = per_head(query, key, options, "dense")
        worst_of(per_head(query, key, options, "auto"), wanted, 512, case, errors)
    return told(errors)


def memory(place: Place, engine: str, length: int) -> Found:
    """Peak of what measuring one call of 8 heads adds, over one H x S x S float32 tensor."""
    if not place.is_cuda:
        from tests.bench.overhead import memory as on_cpu

        share = on_cpu(length, engine)
        return Found(share < 0.25, f"{100 * share:.2f}% of H x S x S float32", {"share": share})
    heads = 8
    query, key = inputs(place, torch.bfloat16, 64, length, heads // 4, batch=1, heads=heads)
    per_head(
        query[:, :, :256], key[:, :, :256], {"is_causal": True}, engine
    )  # proofs and libraries
    place.wait()
    torch.cuda.reset_peak_memory_stats()
    base, began = torch.cuda.memory_allocated(), time.perf_counter()
    per_head(query, key, {"is_causal": True}, engine)
    place.wait()
    seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() - base
    forward = _seconds_of_sdpa(query, key)
    share = peak / (heads * length * length * 4)
    words = (
        f"{peak / 2**20:.0f} MiB, {100 * share:.2f}% of H x S x S float32; "
        f"{1e3 * seconds:.0f} ms ({seconds / forward:.0f} forwards of SDPA)"
    )
    return Found(
        share < 0.05,
        words,
        {"bytes": peak, "share": share, "seconds": seconds, "sdpa_seconds": forward},
    )


def _seconds_of_sdpa(query: Tensor, key: Tensor) -> float:
    attend = torch.nn.functional.scaled_dot_product_attention
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        attend(query, key, key, is_causal=True, enable_gqa=True)
        torch.cuda.synchronize()
    return time.perf_counter() - began


def kernels(place: Place) -> Found:
    """Prove a kernel for each head dimension and dtype, and measure each candidate's deviation."""
    place.need_cuda("candidates for other devices are part of the test suite")
    module = _module()
    figures: dict[str, Any] = {}
    words, missing = [], []
    for name, dtype in DTYPES.items():
        table = module._CANDIDATES if dtype == torch.float32 else module._HALF_CANDIDATES
        for head_dim in (32, 64, 80, 96, 128, 256):
            proven = _proven(place, head_dim, dtype)
            figures[f"{name} D={head_dim}"] = proven
            if head_dim in (64, 128) and proven is None:
                missing.append(f"{name} D={head_dim}")
            for candidate, run in table["cuda"]:
                if candidate == "flex":  # compiled, which takes long: a check of its own
                    continue
                try:
                    off: Any = module._deviation(
                        module.Kernel(candidate, run, dtype), place.device, head_dim
                    )
                except Exception as error:
                    off = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
                figures[f"{name} D={head_dim} {candidate} off by"] = off
                if head_dim in (64, 128):
                    shown = off if isinstance(off, str) else f"{off:.0e}"
                    words.append(f"{name} D={head_dim} {candidate} {shown}")
    none = f"none proven for {', '.join(missing)}; " if missing else ""
    return Found(not missing, none + ", ".join(words), figures)


def flex(place: Place) -> Found:
    """The compiled kernel, that is tried where the others fail."""
    place.need_cuda()
    module = _module()
    run = dict(module._CANDIDATES["cuda"])["flex"]
    off = module._deviation(module.Kernel("flex", run, torch.float32), place.device, 64)
    return Found(off <= AIM, f"off by {off:.1e}", {"deviation": off})


def _module() -> Any:
    """The module of the kernels, which is not public.

    Raises:
        Skipped: if it lies elsewhere now.
    """
    try:
        from stabmon.operator import kernels as module
    except ImportError as error:
        raise Skipped(f"the kernels lie elsewhere now ({error})") from error
    return module


def _proven(place: Place, head_dim: int, dtype: torch.dtype) -> str | None:
    kernel = _module().proven_kernel(place.device, head_dim, dtype)
    return None if kernel is None else kernel.name


def _forget_proofs() -> None:
    _module().prove.cache_clear()
