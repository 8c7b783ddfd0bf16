"""Follow the tokens of a stack through its layers: up from the input, or down from the output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stabmon.analysis.rollout.mixing import HeadFusion, Look, SampleMaps
from stabmon.analysis.rollout.positions import Positions, first_of
from stabmon.analysis.rollout.walks import step_down, step_up

Part = Literal["self", "encoder", "cross"]
"""``self``: a layer of the stack whose tokens are the rows. Joined, its encoder's layers and its
cross attention as well.
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
    """For a sample its maps, and ``[Q]`` bool: the rows that see a key and are not padding."""
    device: torch.device
    dtype: torch.dtype = torch.float32


class Path(ABC):
    """Carry rows or columns of the rollout through the layers of one stack, for every sample."""

    def __init__(self, fusion: HeadFusion, residual: float) -> None:
        self.fusion, self.residual = fusion, residual
        self.layers: list[str] = []
        self.valid: Tensor | None = None
        """``[B, T]``: rows that see a key and are not padding."""
        self.source_valid: Tensor | None = None
        """``[B, S]``: the same of the encoder's tokens, where stacks are joined."""

    def add(
        self, layer: Layer, look: Callable[[str, int, Tensor], Look | None] | None = None
    ) -> None:
        """Take the next layer of the forward.

        Args:
            layer: the layer.
            look: for a layer's name, a sample and its valid rows, what looks at the weights.

        Raises:
            ValueError: if its tokens are not those of the layer before.
        """
        self._check(layer)
        self.layers.append(layer.name)
        self._add(layer, look)

    def note_valid(self, part: Part, rows: list[Tensor]) -> None:
        """Count a row as valid where every layer does."""
        found = torch.stack(rows)
        if part == "encoder":
            self.source_valid = found if self.source_valid is None else self.source_valid & found
        elif part == "self":
            self.valid = found if self.valid is None else self.valid & found

    @abstractmethod
    def _add(
        self, layer: Layer, look: Callable[[str, int, Tensor], Look | None] | None
    ) -> None: ...

    def _check(self, layer: Layer) -> None:
        if layer.part != "cross" and layer.queries != layer.keys:
            raise ValueError(
                f"{layer.name} has {layer.queries} queries and {layer.keys} keys: rollout needs "
                "all tokens as both, without a "
                "cache, a prefix or merged keys; name other layers by attention_layer_pattern"
            )
        known = self.source_valid if layer.part == "encoder" else self.valid
        if known is not None and known.shape != (layer.batch, layer.queries):
            raise ValueError(
                f"{layer.name} attends over {layer.batch} x {layer.queries} tokens and the layer "
                "before over "
                f"{known.shape[0]} x {known.shape[1]}: tokens that are merged or regrouped have "
                "no rollout; name layers over the "
                "same tokens by attention_layer_pattern"
            )


class UpPath(Path):
    """Columns of the rollout: all of them, or those of some sources. Nothing is kept of a layer.

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

    def _add(self, layer: Layer, look: Callable[[str, int, Tensor], Look | None] | None) -> None:
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
            self._step(layer, index, maps, None if look is None else look(layer.name, index, rows))
        self.note_valid(layer.part, valid)

    def _step(self, layer: Layer, index: int, maps: SampleMaps, look: Look | None) -> None:
        state = self.source_state if layer.part == "encoder" else self.state
        assert state is not None
        source = (
            self.source_state[index]
            if layer.part == "cross" and self.source_state is not None
            else None
        )
        flags = self._triangular.setdefault(
            layer.part, [self._choose is None and self.source_state is None] * layer.batch
        )
        work = (
            state[index].clone() if len(state) > 1 else state[index]
        )  # begins where memory is aligned, as alone
        flags[index] = step_up(
            work,
            maps,
            self.fusion,
            self.residual,
            source=source,
            triangular=flags[index],
            look=look,
        )
        if len(state) > 1:
            state[index] = work

    def _start(self, layer: Layer, index: int, valid: Tensor, state: Tensor | None) -> Tensor:
        """The state before the first layer: the identity, or columns of it, first token and ones
        last.
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
        """Return the matrix ``[B, T, S]``, or the columns of it that were asked for, and the first
        token's share ``[B, T]``.
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
        place = first_of(self.source_valid if joined else self.valid)  # type: ignore[arg-type]
        share = self.state.gather(-1, place[:, None, None].expand(-1, self.state.shape[1], 1))[
            ..., 0
        ]
        return self.state, share


class DownPath(Path):
    """Rows of the rollout for some targets. Every layer is kept until the forward ends: queries and
    keys, no map.

    Args:
        fusion, residual: see :func:`stabmon.analysis.rollout.api.attention_rollout`.
    """

    def __init__(self, fusion: HeadFusion, residual: float) -> None:
        super().__init__(fusion, residual)
        self._kept: list[Layer] = []

    def _add(self, layer: Layer, look: Callable[[str, int, Tensor], Look | None] | None) -> None:
        self._kept.append(layer)
        self.note_valid(layer.part, [layer.maps(index)[1] for index in range(layer.batch)])

    def finish(self, wanted: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows ``[B, n, S]`` of the targets, the first token's share ``[B, n]`` and the
        targets ``[B, n]``.
        """
        assert self.valid is not None
        targets = torch.stack([wanted.of(index, row) for index, row in enumerate(self.valid)])
        rows = [self._rows_of(index, targets[index]) for index in range(len(targets))]
        matrix = torch.stack(rows)
        place = first_of(self.valid if self.source_valid is None else self.source_valid)
        share = matrix.gather(-1, place[:, None, None].expand(-1, matrix.shape[1], 1))[..., 0]
        return matrix, share, targets

    def _rows_of(self, index: int, targets: Tensor) -> Tensor:
        last = self._kept[-1]
        own = torch.zeros(len(targets), last.queries, dtype=last.dtype, device=last.device)
        own[torch.arange(len(targets), device=last.device), targets] = 1.0
        joined = self.source_valid is not None
        owed = (
            own.new_zeros(len(targets), self.source_valid.shape[1])
            if self.source_valid is not None
            else own
        )
        for layer in reversed(self._kept):
            maps, _ = layer.maps(index)
            if layer.part == "encoder":
                owed = step_down(owed, maps, self.fusion, self.residual)
            else:
                own = step_down(
                    own,
                    maps,
                    self.fusion,
                    self.residual,
                    source=owed if layer.part == "cross" else None,
                )
        return owed / owed.sum(-1, keepdim=True) if joined else own
