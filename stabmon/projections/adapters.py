r"""Adapters around frozen projections, and what queries and keys effectively become by them.

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
from stabmon.projections.not_applicable import NotApplicable

_ADDED = ("lora_E", "hada_w1_a", "lokr_w1", "lokr_w1_a", "vera_lambda_b")
"""What AdaLoRA, LoHa, LoKr and VeRA call a part of what they add to W."""
_WIDEST = 1024
"""Width up to which that is formed."""
_ROWS = 2048
"""Rows of W that are taken to float32 at a time."""


def is_adapter(module: nn.Module | None) -> bool:
    """Whether a module is an adapter around another, as PEFT makes them."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def base_of(module: nn.Module) -> nn.Module:
    """What adapters are around; the module itself where there are none."""
    while is_adapter(module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def is_frozen(module: nn.Module) -> bool:
    """Whether a projection's own weight is not trained, with or without adapters around it."""
    weight = getattr(base_of(module), "weight", None)
    return isinstance(weight, Tensor) and not weight.requires_grad


def trained_in(module: nn.Module) -> list[nn.Parameter]:
    """What an adapter trains."""
    return [
        each
        for name, each in module.named_parameters()
        if each.requires_grad and "base_layer" not in name.split(".")
    ]


def row_gain(module: nn.Module) -> nn.Parameter | None:
    """The trained vector that multiplies each feature that an adapter makes, bias included; None
    where it has none.
    """
    name = _only(_active(module))
    gains, magnitudes = getattr(module, "ia3_l", {}), getattr(module, "lora_magnitude_vector", {})
    found = None
    if name in gains and not getattr(module, "is_feedforward", False):
        found = gains[name]
    elif (
        name in magnitudes and getattr(base_of(module), "bias", None) is None
    ):  # DoRA adds the bias afterwards
        found = magnitudes[name].weight
    return (
        found
        if isinstance(found, nn.Parameter)
        and found.requires_grad
        and found.shape[0] == found.numel()
        else None
    )


@dataclass(frozen=True, eq=False)
class _State:
    down: Tensor
    """A, ``[R, in]``."""
    up: Tensor
    """B with its scaling, ``[rows, R]``."""
    factor: Tensor | None
    """``[rows]`` what multiplies a row; None for one."""
    is_norm: bool
    """The factor is what the row's norm is to be."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """A state, and of each row its factor g and its squared norm without g; ``[rows]``, float64."""

    state: _State
    gain: Tensor
    square: Tensor


class EffectiveWeight:
    """Rows of a projection as they are used.

    Args:
        module: the projection: an adapter around a frozen one, or a frozen one.
        rows: which of its output features.

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
        """Take the state in; the squared norm of the effective weight."""
        state = self._state()
        if self._squares is None:
            self._squares = self._row_squares(state.down.shape[1])
        product, gram = self._times(state.down), state.down @ state.down.T
        square = self._squares + (
            2 * state.up * product + (state.up @ gram) * state.up
        ).double().sum(1)
        gain = _gain(state, square)
        self._before = _Seen(state, gain, square)
        return (gain.square() * square).sum()

    def change(self) -> Tensor:
        """The squared norm of the effective weight's change since :meth:`before`."""
        seen, state = self._before, self._state()
        assert seen is not None
        was = seen.state
        left = torch.cat([state.up - was.up, was.up], dim=1)  # B'A' - BA = (B' - B) A' + B (A' - A)
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
        """The adapters as they are now, in float32 and of their own memory."""
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        factor, is_norm = None, False
        names = _active(self.module)
        for name in names:
            gains = getattr(self.module, "ia3_l", {})
            magnitudes = getattr(self.module, "lora_magnitude_vector", {})
            if name in gains and not getattr(self.module, "is_feedforward", False):
                own = gains[name].detach().float().flatten()[self.rows]
                factor = own.clone() if factor is None else factor * own
                continue
            if any(_part(self.module, part, name) is not None for part in _ADDED):
                downs, ups = self._formed(name, downs, ups)
                continue
            if name in magnitudes and len(names) == 1:
                factor, is_norm = (
                    magnitudes[name].weight.detach().float().flatten()[self.rows].clone(),
                    True,
                )
            elif getattr(self.module, "lora_variant", {}).get(name) is not None:
                raise NotApplicable(
                    "an adapter of a kind that is not known "
                    f"({type(self.module.lora_variant[name]).__name__})"
                )
            down, up = (
                getattr(_part(self.module, part, name), "weight", None)
                for part in ("lora_A", "lora_B")
            )
            if (
                not isinstance(down, Tensor)
                or not isinstance(up, Tensor)
                or down.ndim != 2
                or is_sharded(down)
            ):
                raise NotApplicable(
                    f"an adapter of a kind that is not known ({type(self.module).__name__})"
                )
            downs.append(down.detach().float())
            ups.append(up.detach().float()[self.rows] * self.module.scaling[name])
        if not downs:
            like = next((each for each in trained_in(self.module)), None)
            device = like.device if like is not None else self._base.weight.device
            downs, ups = (
                [torch.zeros(0, self._width(), device=device)],
                [torch.zeros(self._height(), 0, device=device)],
            )
        return _State(torch.cat(downs), torch.cat(ups, dim=1), factor, is_norm)

    def _formed(
        self, name: str, downs: list[Tensor], ups: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The product of an adapter of which only that is known, as one of its own size with the
        unit matrix.
        """
        if self._width() > _WIDEST or getattr(self.module, "rank_dropout", {}).get(
            name
        ):  # which some versions draw as they form it
            raise NotApplicable(
                f"an adapter whose product is not formed ({type(self.module).__name__})"
            )
        with torch.no_grad():
            added = self.module.get_delta_weight(name).detach().float()
        added = (added.T if type(self._base).__name__ == "Conv1D" else added)[self.rows]
        return [*downs, torch.eye(added.shape[1], device=added.device)], [*ups, added]

    def _weight(self) -> Tensor:
        weight: Tensor = self._base.weight.detach()
        return (weight.T if type(self._base).__name__ == "Conv1D" else weight)[self.rows]

    def _height(self) -> int:
        out = (
            self._weight().shape[0]
            if self._plain
            else len(range(self._base.out_features)[self.rows])
        )
        return int(out)

    def _width(self) -> int:
        return int(self._weight().shape[1] if self._plain else self._base.in_features)

    def _times(self, inputs: Tensor) -> Tensor:
        """W times each of ``[k, in]``: ``[rows, k]``."""
        if not len(inputs):  # a frozen projection beside one with adapters
            return torch.zeros(self._height(), 0, device=inputs.device)
        if self._plain:
            return torch.cat([chunk.float() @ inputs.T for chunk in self._weight().split(_ROWS)])
        bias = self._base.forward(torch.zeros_like(inputs[:1]))
        made: Tensor = (self._base.forward(inputs) - bias).float().T[self.rows]
        return made

    def _row_squares(self, width: int) -> Tensor:
        """Squared norm of each row of W; of one whose numbers are packed, by what it makes of unit
        vectors.
        """
        if self._plain:
            return torch.cat(
                [chunk.float().square().sum(1).double() for chunk in self._weight().split(_ROWS)]
            )
        units = torch.eye(width, device=self._base.weight.device).split(256)
        return torch.stack([self._times(each).double().square().sum(1) for each in units]).sum(0)


class EffectiveUpdate:
    """What everything that makes a layer's queries and keys effectively is, and by how much it
    changed.

    Args:
        weights: its projections.
    """

    def __init__(self, weights: list[EffectiveWeight]) -> None:
        self._weights = weights
        self.trained = list(
            {id(each): each for weight in weights for each in trained_in(weight.module)}.values()
        )
        if not self.trained:
            raise NotApplicable("its queries and keys are frozen, with no adapter around them")

    @torch.no_grad()
    def before(self) -> Tensor:
        """Norm now, which is kept to compare with."""
        with torch.autocast(self.trained[0].device.type, enabled=False):
            return _together([weight.before() for weight in self._weights])

    @torch.no_grad()
    def change(self) -> Tensor:
        """Norm of what changed since."""
        with torch.autocast(self.trained[0].device.type, enabled=False):
            return _together([weight.change() for weight in self._weights])


def _together(squares: list[Tensor]) -> Tensor:
    return torch.stack([each.to(squares[0].device) for each in squares]).sum().sqrt()


def _gain(state: _State, square: Tensor) -> Tensor:
    if state.factor is None:
        return torch.ones_like(square)
    return (
        state.factor.double() / square.clamp_min(1e-30).sqrt()
        if state.is_norm
        else state.factor.double()
    )


def _active(module: nn.Module) -> list[str]:
    """Names of the adapters in use; those merged into the base are part of it."""
    if (
        not is_adapter(module)
        or getattr(module, "disable_adapters", False)
        or getattr(module, "merged", False)
    ):
        return []
    return [str(name) for name in getattr(module, "active_adapters", ())]


def _part(module: nn.Module, part: str, name: str) -> Any:
    """What a ModuleDict of an adapter holds under a name; None where it does not. A ModuleDict has
    no ``get``.
    """
    held: Any = getattr(module, part, {})
    return held[name] if name in held else None  # noqa: SIM401


def _only(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ""
