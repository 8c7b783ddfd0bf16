"""Rollout of a model or of given maps, in chunks if memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.chunks import in_chunks, reproducible, sample_count
from stabmon.analysis.dtypes import compute_dtype
from stabmon.analysis.forward import run_model
from stabmon.analysis.rollout.given_maps import given_layers
from stabmon.analysis.rollout.gradient import weighed_calls
from stabmon.analysis.rollout.mixing import call_maps
from stabmon.analysis.rollout.objectives import Objective
from stabmon.analysis.rollout.paths import DownPath, Layer, ObserverMaker, Part
from stabmon.analysis.rollout.result import Rollout
from stabmon.analysis.rollout.stack_walk import (
    Settings,
    Walk,
    batch_sizes,
    check_start,
    finish_path,
    seen_calls,
)
from stabmon.analysis.rollout.stacks import Chosen, SeenCall, choose, stacks_of
from stabmon.records import AttentionCall


def roll_model(
    model: nn.Module,
    batch: Any,
    settings: Settings,
    *,
    weighting: str | None = None,
    objective: Objective | None = None,
    chunk_size: int | None = None,
    observers: ObserverMaker | None = None,
) -> Rollout:
    """Return the rollout of a model, in chunks if memory runs out.

    Args:
        model, batch, weighting, objective, chunk_size: see :func:`attention_rollout`.
        settings: all other settings.
        observers: makes an observer of the weights from ``(layer, sample, valid rows)``.
    """

    dim = sample_dimension(model)

    def run(part: Any, start: int) -> Rollout:
        mine = settings.part(start)
        if weighting is not None:
            wanted = objective
            if isinstance(wanted, Tensor) and wanted.ndim and part is not batch:
                wanted = wanted[start : start + sample_count(part, dim)]
            return roll_gradient(model, part, mine, wanted)
        if observers is None:
            return roll_forward(model, part, mine, None)
        return roll_forward(
            model, part, mine, lambda layer, at, valid: observers(layer, at + start, valid)
        )

    with reproducible(model, batch):
        rollout = in_chunks(batch, run, merge_rollouts, chunk_size, dim=dim)
    settings.check(len(rollout.matrix))
    return rollout


def roll_forward(
    model: nn.Module, batch: Any, settings: Settings, observers: ObserverMaker | None
) -> Rollout:
    """Return the rollout of one forward.

    Args:
        model, batch: see :func:`attention_rollout`.
        settings: all other settings.
        observers: makes observers of the weights, or None.
    """
    chosen = None
    if settings.stack is not None:
        chosen = choose(seen_calls(model, batch, settings), settings.stack)
    walk = Walk(model, settings, chosen, batch_sizes(batch))

    def on_call(call: AttentionCall) -> None:
        seen = walk.reader.describe(call)
        part = walk.part_of(seen)
        if part is not None:
            walk.take(layer_of(seen, part, call, keep=isinstance(walk.path, DownPath)), observers)

    run_model(
        model,
        batch,
        on_call,
        pattern=settings.pattern,
        attention_modules=settings.attention_modules,
    )
    return walk.finish(batch)


def roll_gradient(
    model: nn.Module, batch: Any, settings: Settings, objective: Objective | None
) -> Rollout:
    """Return the rollout of attention weighted by its gradient.

    One forward finds the stacks, a second one has the backward.

    Args:
        model, batch, objective: see :func:`attention_rollout`.
        settings: all other settings.
    """
    seen = seen_calls(model, batch, settings)
    own = [call for call in seen if call.kind == "self"]
    stacks = stacks_of(seen)
    if settings.stack is None and stacks:
        chosen: Chosen | None = next(
            (each, None) for each in stacks if each.prefix == own[-1].prefix
        )
    else:
        chosen = None if settings.stack is None else choose(seen, settings.stack)
    walk = Walk(model, settings, chosen, batch_sizes(batch))
    parts = {call.layer: part for call in seen if (part := walk.part_of(call)) is not None}
    known = {call.layer: call.is_self for call in seen}
    last = (own[-1].layer, own[-1].is_self) if own else None
    weighed = weighed_calls(
        model, batch, {layer: known[layer] for layer in parts}, objective, settings.targets, last
    )
    for call in seen:
        if call.layer in parts:
            found = weighed[call.layer]
            walk.take(
                Layer(
                    call.layer,
                    parts[call.layer],
                    call.batch,
                    call.queries,
                    call.keys,
                    found.maps,
                    found.value.device,
                    compute_dtype(found.value),
                )
            )
    return replace(walk.finish(batch), weighting="gradient")


def roll_given(maps: Sequence[Any], settings: Settings) -> Rollout:
    """Return the rollout of given maps, first layer first.

    Args:
        maps: see :func:`attention_rollout`.
        settings: settings of the rollout.
    """
    path, layers = settings.path(), list(given_layers(maps))
    check_start(settings.start_layer, [layer.name for layer in layers])
    for layer in layers[settings.start_layer :]:
        path.add(layer)
    rollout = finish_path(path, settings)
    settings.check(len(rollout.matrix))
    return rollout


def layer_of(seen: SeenCall, part: Part, call: AttentionCall, *, keep: bool) -> Layer:
    """Return a call as a layer.

    Args:
        seen: the call's description.
        part: its part in the rollout.
        call: the call.
        keep: True to copy its tensors, which do not outlive the forward.
    """
    if keep:
        query, key = (
            None if each is None else each.detach().clone() for each in (call.query, call.key)
        )
        scores = None if call.scores is None else call.scores.detach().clone()
        call = replace(call, query=query, key=key, scores=scores, module=None)
    tensor = call.scores if call.scores is not None else call.query
    assert tensor is not None
    return Layer(
        seen.layer,
        part,
        seen.batch,
        seen.queries,
        seen.keys,
        lambda index: call_maps(call, index),
        tensor.device,
        compute_dtype(tensor),
    )


def merge_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Join the rollouts of a batch's parts."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(each, name) for each in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("matrix", "targets", "first_token_share", "valid", "source_valid", "sources")
    tensors: dict[str, Any] = {name: joined(name) for name in names}
    return replace(first, **tensors)


def sample_dimension(model: nn.Module) -> int:
    """Return the dimension of the samples in a tensor of three dimensions.

    It is 1 for torch's own attention over ``[S, B, C]``.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.MultiheadAttention)), None)
    return 1 if first is not None and not first.batch_first else 0
