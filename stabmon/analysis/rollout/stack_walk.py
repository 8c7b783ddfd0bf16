"""Choice of a stack of layers during a forward, and the walk through it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from stabmon.analysis.attribution.image_grid import image_grid
from stabmon.analysis.chunks import named_inputs
from stabmon.analysis.forward import run_model
from stabmon.analysis.rollout.mixing import HeadFusion
from stabmon.analysis.rollout.paths import DownPath, Layer, ObserverMaker, Part, UpPath
from stabmon.analysis.rollout.positions import Positions
from stabmon.analysis.rollout.result import Rollout
from stabmon.analysis.rollout.stacks import (
    CallReader,
    Chosen,
    SeenCall,
    Stack,
    listed,
    stacks_of,
)

logger = logging.getLogger("stabmon")

_reported: WeakSet[nn.Module] = WeakSet()
"""Models with a reported choice of stack."""


@dataclass(frozen=True, eq=False)
class Settings:
    """Settings of a rollout."""

    residual: float = 0.5
    start_layer: int = 0
    head_fusion: HeadFusion = "mean"
    targets: Positions | None = None
    sources: Positions | None = None
    stack: str | None = None
    pattern: str | None = None
    attention_modules: tuple[str, ...] = ()

    def part(self, start: int) -> Settings:
        """Return the settings of the part of the batch from sample ``start`` on."""
        targets, sources = (
            None if each is None else each.beginning(start) for each in (self.targets, self.sources)
        )
        return replace(self, targets=targets, sources=sources)

    def check(self, samples: int) -> None:
        """Raise ``ValueError`` for positions of another number of samples."""
        for each in (self.targets, self.sources):
            if each is not None:
                each.check(samples)

    def path(self) -> UpPath | DownPath:
        """Return the cheaper way through the layers."""
        if self.targets is not None and self.sources is None:
            return DownPath(self.head_fusion, self.residual)
        return UpPath(self.head_fusion, self.residual, self.sources)


def seen_calls(model: nn.Module, batch: Any, settings: Settings) -> list[SeenCall]:
    """Return the attention calls of one more forward, in order, without computing any.

    Args:
        model, batch: see :func:`stabmon.analysis.forward.run_model`.
        settings: choose the layers.
    """
    reader, seen = CallReader(model), list[SeenCall]()
    run_model(
        model,
        batch,
        lambda call: seen.append(reader.describe(call)),
        pattern=settings.pattern,
        attention_modules=settings.attention_modules,
    )
    return seen


class Walk:
    """One path through the layers of one stack, chosen while the forward runs.

    Args:
        model: the model.
        settings: settings of the rollout.
        chosen: result of :func:`choose`; None for the stack that attends last, or for all.
        batches: possible numbers of samples of the batch.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, chosen: Chosen | None, batches: frozenset[int]
    ) -> None:
        self.model, self.settings, self.chosen, self.batches = model, settings, chosen, batches
        self.reader = CallReader(model)
        self.path = settings.path()
        self.seen: list[SeenCall] = []
        self._prefix: str | None = None
        self._left: set[str] = set()
        self._count: dict[Part, int] = {"self": 0, "encoder": 0}

    def part_of(self, call: SeenCall) -> Part | None:
        """Return a call's part in the rollout, or None."""
        self.seen.append(call)
        stack, encoder = self.chosen or (None, None)
        if call.kind == "cross":
            is_joined = encoder is not None and stack is not None and call.layer in stack.cross
            return "cross" if is_joined else None
        if stack is not None:
            if encoder is not None and call.layer in encoder.layers:
                return "encoder"
            return "self" if call.layer in stack.layers else None
        if self.settings.stack is None:
            self._follow(call)
        return "self"

    def _follow(self, call: SeenCall) -> None:
        """Start again with another stack's first layer."""
        if call.prefix == self._prefix:
            return
        if call.prefix in self._left:
            raise ValueError(
                f"stacks take turns: choose one of them by stack=: {listed(stacks_of(self.seen))}"
            )
        if self._prefix is not None:
            self._left.add(self._prefix)
            self.path, self._count = self.settings.path(), {"self": 0, "encoder": 0}
        self._prefix = call.prefix

    def take(self, layer: Layer, observers: ObserverMaker | None = None) -> None:
        """Walk through a layer, unless it lies before ``start_layer``.

        Args:
            layer: the layer.
            observers: makes observers of its weights, or None.

        Raises:
            ValueError: if it attends over another batch than the input's.
        """
        if layer.batch not in self.batches:
            raise ValueError(
                f"{layer.name} attends within {layer.batch} groups of {layer.queries} tokens, "
                "which are not the batch's samples: windows have no rollout; choose layers over "
                "whole samples by attention_layer_pattern"
            )
        if layer.part == "cross":
            if self._count["self"] <= self.settings.start_layer and self.settings.start_layer:
                return
        else:
            self._count[layer.part] += 1
            if self._count[layer.part] <= self.settings.start_layer:
                return
        self.path.add(layer, observers)

    def finish(self, batch: Any) -> Rollout:
        """Return the rollout; log its stack if the model has several."""
        stacks = stacks_of(self.seen)
        mine = self._mine(stacks)
        check_start(
            self.settings.start_layer,
            mine.layers if self.chosen is not None or mine.layers else self.path.layers,
        )
        rollout = finish_path(self.path, self.settings)
        name = (
            mine.name if self.settings.stack not in ("joined", "all") else str(self.settings.stack)
        )
        if self.settings.stack is None and len(stacks) > 1 and self.model not in _reported:
            _reported.add(self.model)
            logger.warning(
                "%s has the stacks %s: the rollout is of %s, which attends last; choose another "
                "by stack=",
                type(self.model).__name__,
                listed(stacks),
                name,
            )
        columns = self.chosen[1] if self.chosen is not None and self.chosen[1] is not None else mine
        grid = image_grid(
            self.model, batch, columns.tokens, columns.name if len(stacks) > 1 else None
        )
        return replace(
            rollout, stack=name, stacks=tuple(each.name for each in stacks), image_grid=grid
        )

    def _mine(self, stacks: Sequence[Stack]) -> Stack:
        if self.chosen is not None:
            return self.chosen[0]
        if not stacks:
            layers = ", ".join(call.layer for call in self.seen)
            raise ValueError(
                f"only cross attention was found ({layers}): rollout needs layers that attend "
                "over their own tokens"
            )
        if self.settings.stack == "all":
            return Stack(
                "all", "", stacks[-1].tokens, [layer for each in stacks for layer in each.layers]
            )
        return next(each for each in stacks if each.prefix == self._prefix)


def finish_path(path: UpPath | DownPath, settings: Settings) -> Rollout:
    """Return the rollout at the end of a path.

    Args:
        path: a path through all layers.
        settings: settings of the rollout.
    """
    assert path.valid is not None
    sources: Tensor | None = None
    targets: Tensor | None = None
    if isinstance(path, DownPath):
        assert settings.targets is not None
        settings.targets.check(len(path.valid), is_part=True)
        matrix, first, targets = path.finish(settings.targets)
    else:
        if settings.sources is not None:
            settings.sources.check(len(path.valid), is_part=True)
        matrix, first = path.finish()
        sources = path.sources
        if settings.targets is not None:
            settings.targets.check(len(path.valid), is_part=True)
            targets = torch.stack(
                [settings.targets.of(index, row) for index, row in enumerate(path.valid)]
            )
            matrix = matrix.gather(1, targets[..., None].expand(-1, -1, matrix.shape[2]))
            first = first.gather(1, targets)
    return Rollout(
        matrix,
        targets,
        first,
        path.valid,
        path.valid if path.source_valid is None else path.source_valid,
        sources,
        tuple(path.layers),
        residual=settings.residual,
        start_layer=settings.start_layer,
        head_fusion=settings.head_fusion,
    )


def batch_sizes(batch: Any) -> frozenset[int]:
    """Return the possible numbers of samples of a batch.

    The second dimension of ``[S, B, C]`` is one of them.
    """
    values = named_inputs(batch).values()
    tensors = [each for each in values if isinstance(each, Tensor) and each.ndim]
    first = {each.shape[0] for each in tensors if each.ndim > 1}
    return frozenset(first | {each.shape[1] for each in tensors if each.ndim == 3} | {1})


def check_start(start_layer: int, layers: Sequence[str]) -> None:
    """Raise ``ValueError`` for a first layer out of range.

    Args:
        start_layer: the first layer that counts.
        layers: names of all layers.
    """
    if not 0 <= start_layer < len(layers):
        raise ValueError(
            f"start_layer {start_layer!r}: there are {len(layers)} layers, 0 to "
            f"{len(layers) - 1}: {', '.join(layers)}"
        )
