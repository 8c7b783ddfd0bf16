"""What people do about unstable runs today, each as a context around a training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.capture import AttentionCapture
from stabmon.interventions.run.score_replay import largest_scores
from stabmon.projections.locate import find_query_key
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import AttentionCall, LayerInfo
from tests.bench.references.zclip import ZClip

LARGEST_SCORE = 100.0
"""Score at which Kimi K2 clips (arXiv:2507.20534)."""
HALF_NORM = 0.5
"""Half of the gradient norm that most recipes clip at."""

Mitigation = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[None]]


@contextlib.contextmanager
def zclip(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Clip spikes of the gradient norm by their z-score, after the loop's own clipping."""
    rule, parameters = ZClip(), list(model.parameters())

    def clip(*_: Any) -> None:
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if (most := rule.clipped(norm)) != norm:
            nn.utils.clip_grads_with_norm_(parameters, most, torch.tensor(norm))

    hook = optimizer.register_step_pre_hook(clip)
    yield
    hook.remove()


@contextlib.contextmanager
def half_clip(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Clip the gradient norm at half of what is usual."""

    def clip(*_: Any) -> None:  # what a hook returns would be taken for new arguments
        nn.utils.clip_grad_norm_(model.parameters(), HALF_NORM)

    hook = optimizer.register_step_pre_hook(clip)
    yield
    hook.remove()


@contextlib.contextmanager
def clip_at_100(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Scale W_q and W_k of each head whose largest score exceeds 100, after each step."""
    seen: dict[str, Tensor] = {}
    parts: dict[str, Any] = {}

    def note(call: AttentionCall) -> None:
        if call.module is not None and not call.module.training:
            return
        scores = largest_scores(call)
        if call.layer not in parts and call.module is not None:
            width = call.query.shape[-1] if call.query is not None else 0
            info = LayerInfo(len(scores), width, call.scale, "float32")
            with contextlib.suppress(NotApplicable):
                parts[call.layer] = find_query_key(call.module, info)[0]
        seen[call.layer] = scores

    @torch.no_grad()
    def clip(*_: Any) -> None:
        for layer, scores in seen.items():
            above = {
                head: LARGEST_SCORE / score
                for head, score in enumerate(scores.tolist())
                if LARGEST_SCORE < score < float("inf")
            }
            for rows, factor in parts[layer].edits(above) if above and layer in parts else ():
                rows.view(rows.parameter).mul_(factor)
        seen.clear()

    hook = optimizer.register_step_post_hook(clip)
    with AttentionCapture(model, note):
        yield
    hook.remove()


MITIGATIONS: dict[str, Mitigation] = {
    "zclip": zclip,
    "half_clip": half_clip,
    "clip_at_100": clip_at_100,
}
