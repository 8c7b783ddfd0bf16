r"""Effective weight of queries and keys under adapters around frozen projections.

LoRA, DoRA and IA3 make :math:`\mathrm{diag}(g)\,(W + B A)` of a frozen W: g is one (LoRA), a
learned vector (IA3), or a learned magnitude over the norm of each row of W + B A (DoRA). Its norm,
and that of its change, come from products with the few rows of A: no matrix of W's size is made.
Where something else is added to W (AdaLoRA, LoHa, LoKr, VeRA) that is formed, if W is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.tensors import is_sharded
from stabmon.projections.adapter_modules import (
    active_adapters,
    adapter_part,
    base_of,
    ia3_gain,
    is_transposed,
    trained_in,
)
from stabmon.projections.not_applicable import NotApplicable

_ADDED = ("lora_E", "hada_w1_a", "lokr_w1", "lokr_w1_a", "vera_lambda_b")
"""Attributes of AdaLoRA, LoHa, LoKr and VeRA for a part of what they add to W."""
_WIDEST = 1024
"""Width up to which that is formed."""
_ROWS = 2048
"""Rows of W that are converted to float32 at a time."""


@dataclass(frozen=True, eq=False)
class _State:
    """Adapters of a projection at one moment."""

    down: Tensor
    """A, ``[R, in]``."""
    up: Tensor
    """B with its scaling, ``[rows, R]``."""
    factor: Tensor | None
    """Factor of each row, ``[rows]``; None for one."""
    is_norm: bool
    """The factor is the norm of the row after it was multiplied."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """A state with the factor g of each row and its squared norm without g.

    Both are ``[rows]``, float64.
    """

    state: _State
    gain: Tensor
    square: Tensor


class EffectiveWeight:
    """Rows of a projection as they are used.

    Args:
        module: the projection: an adapter around a frozen one, or a frozen one.
        rows: range of its output features.

    Raises:
        NotApplicable: for an adapter of another kind, or a base that is trained, sharded, or no
            linear map.
    """

    def __init__(self, module: nn.Module, rows: slice = slice(None)) -> None:
        self.module: Any = module
        self.rows = rows
        self._base: Any = base_of(module)
        weight = getattr(self._base, "weight", None)
        self._plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.ndim == 2
        self._squares: Tensor | None = None
        self._before: _Seen | None = None
        if isinstance(weight, Tensor) and (weight.requires_grad or is_sharded(weight)):
            raise NotApplicable(
                "some of its queries and keys are trained without an adapter, or sharded"
            )
        self._state()

    def before(self) -> Tensor:
        """Keep the present state, and return the squared norm of the effective weight."""
        state = self._state()
        if self._squares is None:
            self._squares = self._row_squares(state.down.shape[1])
        product, gram = self._times(state.down), state.down @ state.down.T
        added = 2 * state.up * product + (state.up @ gram) * state.up
        square = self._squares + added.double().sum(1)
        gain = _gain(state, square)
        self._before = _Seen(state, gain, square)
        return (gain.square() * square).sum()

    def change(self) -> Tensor:
        """Return the squared norm of the effective weight's change since :meth:`before`."""
        seen, state = self._before, self._state()
        assert seen is not None
        was = seen.state
        # B'A' - BA = (B' - B) A' + B (A' - A)
        left = torch.cat([state.up - was.up, was.up], dim=1)
        right = torch.cat([state.down, state.down - was.down])
        along = ((self._times(right) + was.up @ (was.down @ right.T)) * left).double().sum(1)
        moved = ((left @ (right @ right.T)) * left).double().sum(1)
        gain = _gain(state, seen.square + 2 * along + moved)
        by_gain = gain - seen.gain
        change: Tensor = (
            by_gain.square() * seen.square + 2 * by_gain * gain * along + gain.square() * moved
        ).sum()
        return change.clamp_min(0)

    def _state(self) -> _State:
        """Return the adapters as they are now, in float32 and in their own memory."""
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        factor, is_norm = None, False
        names = active_adapters(self.module)
        for name in names:
            gain = ia3_gain(self.module, name)
            if gain is not None:
                own = gain.detach().float().flatten()[self.rows]
                factor = own.clone() if factor is None else factor * own
                continue
            if any(adapter_part(self.module, part, name) is not None for part in _ADDED):
                down, up = self._formed(name)
            else:
                magnitude = adapter_part(self.module, "lora_magnitude_vector", name)
                if magnitude is not None and len(names) == 1:
                    factor = magnitude.weight.detach().float().flatten()[self.rows].clone()
                    is_norm = True
                elif getattr(self.module, "lora_variant", {}).get(name) is not None:
                    raise _unknown(self.module.lora_variant[name])
                down, up = self._low_rank(name)
            downs.append(down)
            ups.append(up)
        if not downs:
            trained = trained_in(self.module)
            device = (trained[0] if trained else self._base.weight).device
            downs = [torch.zeros(0, self._width(), device=device)]
            ups = [torch.zeros(self._height(), 0, device=device)]
        return _State(torch.cat(downs), torch.cat(ups, dim=1), factor, is_norm)

    def _low_rank(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and the scaled B of a LoRA adapter."""
        down, up = (
            getattr(adapter_part(self.module, part, name), "weight", None)
            for part in ("lora_A", "lora_B")
        )
        if not isinstance(down, Tensor) or not isinstance(up, Tensor):
            raise _unknown(self.module)
        if down.ndim != 2 or is_sharded(down):
            raise _unknown(self.module)
        scaling = self.module.scaling[name]
        return down.detach().float(), up.detach().float()[self.rows] * scaling

    def _formed(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the unit matrix and the formed product of an adapter without factors."""
        # some versions of PEFT draw rank_dropout as they form it
        drops = getattr(self.module, "rank_dropout", {}).get(name)
        if self._width() > _WIDEST or drops:
            raise NotApplicable(
                f"an adapter whose product is not formed ({type(self.module).__name__})"
            )
        with torch.no_grad():
            added = self.module.get_delta_weight(name).detach().float()
        added = (added.T if is_transposed(self._base) else added)[self.rows]
        return torch.eye(added.shape[1], device=added.device), added

    def _weight(self) -> Tensor:
        weight: Tensor = self._base.weight.detach()
        return (weight.T if is_transposed(self._base) else weight)[self.rows]

    def _height(self) -> int:
        if self._plain:
            return int(self._weight().shape[0])
        return len(range(self._base.out_features)[self.rows])

    def _width(self) -> int:
        return int(self._weight().shape[1] if self._plain else self._base.in_features)

    def _times(self, inputs: Tensor) -> Tensor:
        """Return W times each of ``[k, in]``: ``[rows, k]``."""
        if not len(inputs):  # a frozen projection beside one with adapters
            return torch.zeros(self._height(), 0, device=inputs.device)
        if self._plain:
            return torch.cat([chunk.float() @ inputs.T for chunk in self._weight().split(_ROWS)])
        bias = self._base.forward(torch.zeros_like(inputs[:1]))
        made: Tensor = (self._base.forward(inputs) - bias).float().T[self.rows]
        return made

    def _row_squares(self, width: int) -> Tensor:
        """Return the squared norm of each row of W.

        Of a W whose numbers are packed, from its products with unit vectors.
        """
        if self._plain:
            return torch.cat(
                [chunk.float().square().sum(1).double() for chunk in self._weight().split(_ROWS)]
            )
        units = torch.eye(width, device=self._base.weight.device).split(256)
        return torch.stack([self._times(each).double().square().sum(1) for each in units]).sum(0)


class EffectiveUpdate:
    """Effective weight of all that makes a layer's queries and keys, and its change.

    Args:
        weights: its projections.

    Raises:
        NotApplicable: if nothing of them is trained.
    """

    def __init__(self, weights: list[EffectiveWeight]) -> None:
        self._weights = weights
        trained = (each for weight in weights for each in trained_in(weight.module))
        self.trained = list({id(each): each for each in trained}.values())
        if not self.trained:
            raise NotApplicable("its queries and keys are frozen, with no adapter around them")

    @torch.no_grad()
    def before(self) -> Tensor:
        """Return the norm now, and keep the state to compare with."""
        with torch.autocast(self.trained[0].device.type, enabled=False):
            return _together([weight.before() for weight in self._weights])

    @torch.no_grad()
    def change(self) -> Tensor:
        """Return the norm of the change since :meth:`before`."""
        with torch.autocast(self.trained[0].device.type, enabled=False):
            return _together([weight.change() for weight in self._weights])


def _together(squares: list[Tensor]) -> Tensor:
    return torch.stack([each.to(squares[0].device) for each in squares]).sum().sqrt()


def _gain(state: _State, square: Tensor) -> Tensor:
    """Return the factor g of each row, from its squared norm without g."""
    if state.factor is None:
        return torch.ones_like(square)
    factor = state.factor.double()
    return factor / square.clamp_min(1e-30).sqrt() if state.is_norm else factor


def _unknown(adapter: object) -> NotApplicable:
    return NotApplicable(f"an adapter of an unknown kind ({type(adapter).__name__})")
