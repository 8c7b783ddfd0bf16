"""Paths of tokens through a stack's layers, upwards from the input or downwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stabmon.analysis.rollout.mixing import HeadFusion, Observer, SampleMaps
from stabmon.analysis.rollout.positions import Positions, first_of
from stabmon.analysis.rollout.walks import step_down, step_up

Part = Literal["self", "encoder", "cross"]
"""Part of a layer in the rollout.

``self``: a layer of the stack whose tokens are the rows. If stacks are joined, ``encoder`` and
``cross``: its encoder's layers and its cross attention.
"""


@dataclass(frozen=True, eq=False)
class Layer:
    """One attention layer of a whole batch."""

    name: str
    part: Part
    batch: int
    queries: int
    keys: int
    maps: Callable[[int], tuple[SampleMaps, Tensor]]
    """Function from a sample to its maps, and its valid rows ``[Q]`` bool."""
    device: torch.device
    dtype: torch.dtype = torch.float32


ObserverMaker = Callable[[str, int, Tensor], Observer | None]
"""Function from a layer, a sample and its valid rows to an observer, or None."""


class Path(ABC):
    """Path of rows or columns of the rollout through one stack, for every sample."""

    def __init__(self, fusion: HeadFusion, residual: float) -> None:
        self.fusion, self.residual = fusion, residual
        self.layers: list[str] = []
        self.valid: Tensor | None = None
        """Valid rows ``[B, T]``: they see a key and are no padding."""
        self.source_valid: Tensor | None = None
        """Valid rows of the encoder's tokens, ``[B, S]``, if stacks are joined."""

    def add(self, layer: Layer, observers: ObserverMaker | None = None) -> None:
        """Take the next layer of the forward.

        Args:
            layer: the layer.
            observers: makes an observer of the weights for each sample.

        Raises:
            ValueError: if its tokens are not those of the layer before.
        """
        self._check(layer)
        self.layers.append(layer.name)
        self._add(layer, observers)

    def note_valid(self, part: Part, rows: list[Tensor]) -> None:
        """Count a row as valid if every layer does.

        Args:
            part: part of the layer.
            rows: ``[N]`` bool of each sample.
        """
        found = torch.stack(rows)
        if part == "encoder":
            self.source_valid = found if self.source_valid is None else self.source_valid & found
        elif part == "self":
            self.valid = found if self.valid is None else self.valid & found

    @abstractmethod
    def _add(self, layer: Layer, observers: ObserverMaker | None) -> None: ...

    def first_share(self, matrix: Tensor) -> Tensor:
        """Return the share ``[B, T]`` of each sample's first token in ``[B, T, S]``."""
        valid = self.valid if self.source_valid is None else self.source_valid
        assert valid is not None
        place = first_of(valid)[:, None, None].expand(-1, matrix.shape[1], 1)
        return matrix.gather(-1, place)[..., 0]

    def _check(self, layer: Layer) -> None:
        if layer.part != "cross" and layer.queries != layer.keys:
            raise ValueError(
                f"{layer.name} has {layer.queries} queries and {layer.keys} keys: rollout needs "
                "all tokens as both, without a cache, a prefix or merged keys; choose other layers "
                "by attention_layer_pattern"
            )
        known = self.source_valid if layer.part == "encoder" else self.valid
        if known is not None and known.shape != (layer.batch, layer.queries):
            raise ValueError(
                f"{layer.name} attends over {layer.batch} x {layer.queries} tokens and the layer "
                f"before over {known.shape[0]} x {known.shape[1]}: merged or regrouped tokens have "
                "no rollout; choose layers over the same tokens by attention_layer_pattern"
            )


class UpPath(Path):
    """Columns of the rollout, all or some, carried up without keeping any layer.

    Args:
        fusion, residual: see :func:`stabmon.analysis.rollout.api.attention_rollout`.
        sources: the columns; None for all.
    """

    def __init__(self, fusion: HeadFusion, residual: float, sources: Positions | None) -> None:
        super().__init__(fusion, residual)
        self._choose = sources
        self.sources: Tensor | None = None
        self.state: Tensor | None = None
        self.source_state: Tensor | None = None
        self._triangular: dict[Part, list[bool]] = {}

    def _add(self, layer: Layer, observers: ObserverMaker | None) -> None:
        valid: list[Tensor] = []
        is_first = (self.source_state if layer.part == "encoder" else self.state) is None
        for index in range(layer.batch):
            maps, rows = layer.maps(index)
            valid.append(rows)
            if is_first and layer.part == "self" and self.source_state is None:
                self.state = self._start(layer, index, rows, self.state)
            elif is_first and layer.part == "encoder":
                self.source_state = self._start(layer, index, rows, self.source_state)
            elif is_first and index == 0:
                assert self.source_state is not None
                width = self.source_state.shape[2]
                self.state = torch.zeros(
                    layer.batch, layer.queries, width, dtype=layer.dtype, device=layer.device
                )
            observer = None if observers is None else observers(layer.name, index, rows)
            self._step(layer, index, maps, observer)
        self.note_valid(layer.part, valid)

    def _step(self, layer: Layer, index: int, maps: SampleMaps, observer: Observer | None) -> None:
        state = self.source_state if layer.part == "encoder" else self.state
        assert state is not None
        is_cross = layer.part == "cross" and self.source_state is not None
        source = self.source_state[index] if is_cross else None  # type: ignore[index]
        flags = self._triangular.setdefault(
            layer.part, [self._choose is None and self.source_state is None] * layer.batch
        )
        # a clone is aligned in memory as a single sample is
        work = state[index].clone() if len(state) > 1 else state[index]
        flags[index] = step_up(
            work,
            maps,
            self.fusion,
            self.residual,
            source=source,
            triangular=flags[index],
            observer=observer,
        )
        if len(state) > 1:
            state[index] = work

    def _start(self, layer: Layer, index: int, valid: Tensor, state: Tensor | None) -> Tensor:
        """Return the state before the first layer: the identity, or columns of it.

        Chosen columns are followed by the first token's and a column of ones.
        """
        tokens = layer.queries
        if self._choose is None:
            if state is None:
                state = torch.zeros(
                    layer.batch, tokens, tokens, dtype=layer.dtype, device=layer.device
                )
            state[index].fill_diagonal_(1.0)
            return state
        columns = self._choose.of(index, valid)
        if state is None:
            state = torch.zeros(
                layer.batch, tokens, len(columns) + 2, dtype=layer.dtype, device=layer.device
            )
            self.sources = torch.zeros(
                layer.batch, len(columns), dtype=torch.int64, device=layer.device
            )
        assert self.sources is not None
        self.sources[index] = columns
        state[index, columns, torch.arange(len(columns), device=layer.device)] = 1.0
        state[index, first_of(valid), -2] = 1.0
        state[index, :, -1] = 1.0
        return state

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the matrix ``[B, T, S]``, or chosen columns, and the first token's share.

        The share is ``[B, T]``.
        """
        assert self.state is not None
        assert self.valid is not None
        joined = self.source_state is not None
        if self._choose is not None:
            matrix, first = self.state[..., :-2], self.state[..., -2]
            if joined:
                total = self.state[..., -1]
                matrix, first = matrix / total[..., None], first / total
            return matrix.contiguous(), first.contiguous()
        if joined:
            self.state /= self.state.sum(-1, keepdim=True)
        return self.state, self.first_share(self.state)


class DownPath(Path):
    """Rows of the rollout for some targets, carried down at the end of the forward.

    Queries and keys of every layer are kept until then, no map.

    Args:
        fusion, residual: see :func:`stabmon.analysis.rollout.api.attention_rollout`.
    """

    def __init__(self, fusion: HeadFusion, residual: float) -> None:
        super().__init__(fusion, residual)
        self._kept: list[Layer] = []

    def _add(self, layer: Layer, observers: ObserverMaker | None) -> None:
        self._kept.append(layer)
        self.note_valid(layer.part, [layer.maps(index)[1] for index in range(layer.batch)])

    def finish(self, wanted: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Return the targets' rows ``[B, n, S]``, first token's shares and positions.

        Shares and positions are ``[B, n]``.
        """
        assert self.valid is not None
        targets = torch.stack([wanted.of(index, row) for index, row in enumerate(self.valid)])
        rows = [self._rows_of(index, targets[index]) for index in range(len(targets))]
        matrix = torch.stack(rows)
        return matrix, self.first_share(matrix), targets

    def _rows_of(self, index: int, targets: Tensor) -> Tensor:
        last = self._kept[-1]
        own = torch.zeros(len(targets), last.queries, dtype=last.dtype, device=last.device)
        own[torch.arange(len(targets), device=last.device), targets] = 1.0
        owed = own
        if self.source_valid is not None:
            owed = own.new_zeros(len(targets), self.source_valid.shape[1])
        for layer in reversed(self._kept):
            maps, _ = layer.maps(index)
            if layer.part == "encoder":
                owed = step_down(owed, maps, self.fusion, self.residual)
            else:
                source = owed if layer.part == "cross" else None
                own = step_down(own, maps, self.fusion, self.residual, source=source)
        return own if self.source_valid is None else owed / owed.sum(-1, keepdim=True)
