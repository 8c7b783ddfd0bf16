"""Fused kernels that return their logsumexp, each proven on a device before use.

The kernels below ``torch.ops.aten._scaled_dot_product_*`` are private: they are the only way to the
logsumexp that scaled_dot_product_attention computes. Checked with torch 2.13. A changed signature
fails the proof, with a warning, and the blockwise engine is used.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stabmon._torch.graph_capture import is_capturing
from stabmon.operator.computing import computing_on

logger = logging.getLogger("stabmon")

_TOLERANCE = 1e-3
"""Largest deviation of a kernel from the blockwise engine, in nats and units of values."""
Run = Callable[[Tensor, Tensor, Tensor, "Tensor | None", bool, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """A fused attention kernel.

    ``run(query [B, H, Q, D], key [B, H_kv, K, D], value [B, H_kv, K, D], additive mask or None,
    is_causal, scale)`` gives the output ``[B, H, Q, D]`` and the natural logsumexp ``[B, H, Q]``.
    """

    name: str
    run: Run
    dtype: torch.dtype
    """Dtype in which it computes.

    A half-precision kernel's logsumexp is as exact as its inputs; its output is rounded, and not
    used.
    """


def _cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    # private, see the module: returns (output, logsumexp [B, H, Q])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _expand(q: Tensor, *others: Tensor) -> list[Tensor]:
    return [
        x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] != q.shape[1] else x
        for x in others
    ]


def _bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the mask with rows aligned as the kernels need, expanded as a view."""
    if mask is None:
        return None
    padded = F.pad(mask.to(q.dtype), (0, -mask.shape[-1] % 16))[..., : mask.shape[-1]]
    return padded.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    k, v = _expand(q, k, v)
    # private, see the module: compute_log_sumexp=True; the logsumexp is padded in Q
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, _bias(q, k, mask), True, 0.0, causal, scale=scale
    )
    return out, lse[..., : q.shape[2]]


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    k, v = _expand(q, k, v)
    # private, see the module: compute_log_sumexp=True; the logsumexp is [B, H, Q, 1]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, _bias(q, k, mask), True, 0.0, causal, False, scale=scale
    )
    return out, lse.reshape(*q.shape[:3])


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if mask is not None:
        return _cudnn(q, k, v, mask, causal, scale)
    k, v = _expand(q, k, v)
    # private, see the module: half precision only, no mask
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return out, lse


def _flex(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def score(z: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        z = z if mask is None else z + mask[b % mask.shape[0], h % mask.shape[1], i, j]
        return torch.where(i >= j, z, -float("inf")) if causal else z

    out, aux = torch.compile(flex_attention)(
        q,
        k,
        v,
        score_mod=score,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),  # type: ignore[arg-type]
    )
    return out, aux.lse


_CANDIDATES: dict[str, tuple[tuple[str, Run], ...]] = {
    "cpu": (("flash_for_cpu", _cpu),),
    "cuda": (("efficient", _efficient), ("flex", _flex)),
}
_HALF_CANDIDATES: dict[str, tuple[tuple[str, Run], ...]] = {
    "cuda": (("flash", _flash), ("cudnn", _cudnn))
}


class _CannotTry(Exception):
    """A proof failed for a reason that may pass: no memory, or a graph that is captured."""


def proven_kernel(
    device: torch.device, head_dim: int, dtype: torch.dtype = torch.float32
) -> Kernel | None:
    """Return the device's first kernel that agrees with the blockwise engine.

    The proof is a small random case with random numbers of its own, made once per device, head
    dimension and dtype; anew where there was no memory for it, or a CUDA graph was captured.

    Args:
        device: the device of the inputs.
        head_dim: D.
        dtype: of the kernel's inputs; half precision for the logsumexp alone.

    Returns:
        None, with one warning, where none agrees.
    """
    try:
        return prove(device, head_dim, dtype)
    except _CannotTry:
        return None


@functools.lru_cache(maxsize=64)  # which remembers nothing where this raises
def prove(device: torch.device, head_dim: int, dtype: torch.dtype) -> Kernel | None:
    """See :func:`proven_kernel`, which catches what this raises where it cannot be tried now."""
    if is_capturing():
        raise _CannotTry
    table = _CANDIDATES if dtype == torch.float32 else _HALF_CANDIDATES
    failures = []
    for name, run in table.get(device.type, ()):
        kernel = Kernel(name, run, dtype)
        try:
            deviation = _deviation(kernel, device, head_dim)
        except torch.OutOfMemoryError as error:
            raise _CannotTry from error
        except Exception as error:
            if is_capturing():
                raise _CannotTry from error
            failures.append(
                f"{name} failed ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else ''})"
            )
            continue
        if deviation <= _TOLERANCE:
            return kernel
        failures.append(f"{name} is off by {deviation:.1g}")
    if failures:
        logger.warning(
            "Fused attention on %s, head dim %d: %s; the blockwise engine is used.",
            device,
            head_dim,
            "; ".join(failures),
        )
    return None


def _deviation(kernel: Kernel, device: torch.device, head_dim: int) -> float:
    """Return a kernel's largest deviation from the blockwise engine; inf for NaN.

    Over the logsumexp, and in float32 also over the output.
    """
    from stabmon.operator.blockwise import BlockwiseAttention
    from stabmon.operator.visibility.visibility import Visibility

    generator = torch.Generator().manual_seed(0)
    size = 80
    query = torch.randn(2, 4, size, head_dim, generator=generator).to(device, kernel.dtype)
    key = torch.randn(2, 2, size, head_dim, generator=generator).to(device, kernel.dtype)
    visible = (torch.rand(2, 1, size, size, generator=generator) > 0.3).to(device)
    visible[..., 0] = True
    worst = 0.0
    with computing_on(device):
        for causal, mask in ((False, None), (True, None), (False, visible)):
            scale = 2.0 * head_dim**-0.5
            see = Visibility(size, size, causal, None, mask, 0, device)
            reference = BlockwiseAttention(query, key, scale, see, None, None)
            additive = (
                None
                if mask is None
                else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -float("inf"))
            )
            out, lse = kernel.run(query, key, key, additive, causal, scale)
            worst = max(
                worst,
                (lse.float() - reference.log_partition())
                .abs()
                .max()
                .nan_to_num(float("inf"))
                .item(),
            )
            if kernel.dtype == torch.float32:
                worst = max(
                    worst, (out - reference.matvec(key)).abs().max().nan_to_num(float("inf")).item()
                )
    return worst
