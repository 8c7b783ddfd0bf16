"""Measure how well an optimizer's step did on the batch that it was computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall, is_split
from stabmon._torch.isolation import has_hooks_of_others
from stabmon._torch.tensors import local
from stabmon.engine.step_length.objective import Objective

COPY_BYTES = 1 << 30
"""Bytes of trained parameters up to which steps are probed; the parameters are copied."""
AHEAD = 4.0
"""Times the median relative change of other groups from which a group is examined alone."""
_FORWARDS = 4
"""Largest number of forwards of a step that are replayed."""
_TOO_SMALL = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Predicted change over the objective below which rounding hides it, by the forward's format."""
_SHORT = 1e-2
"""The same for shorter formats."""


@dataclass(frozen=True)
class StepQuality:
    """The change that a step made to the objective of its own batch."""

    step: int
    gain_ratio: float
    """Actual over predicted decrease: 1 for a small step, 1/2 at the minimum of a quadratic along
    the step, 0 where nothing was gained, below where the objective rose. NaN where the step was too
    small to tell."""
    rise: float
    """Actual change of the objective over its size: above 0 where it rose."""


@dataclass
class _Held:
    """The parameters of one group around a step."""

    key: str
    parameters: list[Tensor]
    before: list[Tensor]
    predicted: Tensor | None = None

    @property
    def has_matrices(self) -> bool:
        """Return whether it has more than biases and gains.

        The size of biases and gains says little about how far they may move.
        """
        return any(each.ndim >= 2 for each in self.parameters)

    def share(self) -> float:
        """Return the norm of the step over the norm of the parameters before it."""
        pairs = list(zip(self.parameters, self.before, strict=True))
        moved = torch.stack([_norm(now.detach() - was) for now, was in pairs]).norm()
        size = torch.stack([_norm(was) for was in self.before]).norm()
        return float(moved / size) if float(size) > 0 else math.inf


class StepProbe:
    r"""Change of a step's objective on its own batch, against its prediction.

    The gain ratio of trust-region methods, :math:`\rho = (f(p + d) - f(p)) / (\nabla f(p)^T d)`,
    needs neither a scale of the weights nor a history: f is the objective that backward
    differentiated on the step's own forwards (see
    :class:`~stabmon.engine.step_length.objective.Objective`), with the random numbers of the first
    pass. A probed step costs a copy of the trained parameters and one forward without gradients.
    No step is probed where these are larger than ``COPY_BYTES`` or lie on several ranks, and where
    somebody's forward hook would notice.

    Args:
        model: the model, as its forwards were recorded.

    References:
        Nocedal & Wright, Numerical Optimization, 2006, eq. 4.4.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._able: bool | None = None
        self._seen: list[tuple[ForwardCall, Objective]] = []
        self._forwards = 0
        self._norms: list[Tensor] = []
        self._groups: list[_Held] = []
        self.active = False
        """True if the step in progress is probed."""

    def begin(self, wanted: bool) -> None:
        """Drop the last step, and probe the one that begins if ``wanted`` and possible."""
        self.end()
        if wanted and self._able is None:
            trained = [each for each in self._model.parameters() if each.requires_grad]
            size = sum(each.numel() * each.element_size() for each in trained)
            self._able = 0 < size <= COPY_BYTES and not is_split(self._model)
        self.active = wanted and bool(self._able) and not has_hooks_of_others(self._model)

    def end(self) -> None:
        """Drop everything of the step."""
        for _, objective in self._seen:
            objective.release()
        self._seen, self._norms, self._groups, self._forwards = [], [], [], 0
        self.active = False

    def add_forward(self, call: ForwardCall | None, output: object) -> None:
        """Add a training forward that has returned.

        Args:
            call: can repeat the forward; None where its inputs were not kept.
            output: the model's output, with its graph.
        """
        if self.active:
            self._forwards += 1
            if call is not None and len(self._seen) < _FORWARDS:
                self._seen.append((call, Objective(output)))

    @torch.no_grad()
    def note_backward(self) -> None:
        """Measure the gradients of the objective, before anything clips or unscales them."""
        if self.active:
            self._norms = [_norm(each.grad) for each in self._trained()]

    @torch.no_grad()
    def before(self, groups: Mapping[str, Sequence[Tensor]]) -> None:
        """Copy parameters that an optimizer is about to step, by the name of their group."""
        known = {each.key for each in self._groups}
        if self.active:
            for key, parameters in groups.items():
                if key not in known:
                    own = [each for each in parameters if each.requires_grad]
                    self._groups.append(_Held(key, own, [each.detach().clone() for each in own]))

    @torch.no_grad()
    def after(self, keys: Sequence[str]) -> None:
        """Predict the change by the step of these groups, while gradients are still there."""
        if not self.active or not self._norms:
            return
        trained = self._trained()
        if len(trained) != len(self._norms):
            return
        met = {
            id(each): (was, _norm(each.grad))
            for each, was in zip(trained, self._norms, strict=True)
        }
        for group in self._groups:
            if group.key in keys and group.predicted is None:
                parts = []
                for parameter, before in zip(group.parameters, group.before, strict=True):
                    if parameter.grad is None or id(parameter) not in met:
                        continue
                    was, now = met[
                        id(parameter)
                    ]  # what was clipped or unscaled in the meantime is put back
                    change = (
                        local(parameter.grad).float()
                        * (local(parameter.detach()).float() - local(before).float())
                    ).sum()
                    parts.append(torch.where(now > 0, change * was / now, 0.0).double())
                if parts:
                    group.predicted = torch.stack(
                        [each.to(parts[0].device) for each in parts]
                    ).sum()

    @torch.no_grad()
    def quality(self, step: int) -> StepQuality | None:
        """Return what the step did to its objective; None where that cannot be known."""
        predicted = self._predicted()
        if predicted is None:
            return None
        found = self._change()
        if found is None:
            return None
        change, size = found
        least = self._too_small()
        ratio = (
            change / predicted
            if abs(predicted) > least * size or abs(change) > 10 * least * size
            else math.nan
        )
        return StepQuality(step, ratio, change / size if size else math.nan)

    @torch.no_grad()
    def find_factors(self, target: float = 0.6, max_forwards: int = 5) -> dict[str, float]:
        """Find the factor on each group's step that gives a gain ratio.

        It is one group alone where that moves much further than the others and these fit without
        it; else all, by the same factor. The parameters are moved back along the step to find it,
        and are bit for bit where they were afterwards.

        Args:
            target: the gain ratio to reach.
            max_forwards: limit of forwards to find it with.

        Returns:
            Factors in (0, 1], by group; groups that do not overshoot are left out.
        """
        keys = [each.key for each in self._groups if each.predicted is not None]
        alone = [
            key
            for key in self._ahead()
            if self._fits_without(key, [each for each in keys if each != key], target)
        ]
        return dict.fromkeys(alone or keys, self._search(alone or keys, target, max_forwards))

    @torch.no_grad()
    def shorten(self, factors: Mapping[str, float]) -> Callable[[], None] | None:
        """Shorten the step that was just made.

        Args:
            factors: the share of the step to keep, by group.

        Returns:
            A function that undoes it; None where no group was copied before the step.
        """
        moved = []
        for group in self._groups:
            if group.key in factors:
                for parameter, before in zip(group.parameters, group.before, strict=True):
                    moved.append((parameter, parameter.detach().clone()))
                    parameter.copy_(torch.lerp(before, parameter.detach(), factors[group.key]))
        if not moved:
            return None

        @torch.no_grad()
        def put_back() -> None:
            for parameter, bits in moved:
                parameter.copy_(bits)

        return put_back

    def _ahead(self) -> list[str]:
        """Return the group that moves ``AHEAD`` times further than others, if any."""
        shares = {
            group.key: group.share()
            for group in self._groups
            if group.predicted is not None and group.has_matrices
        }
        if len(shares) < 2:
            return []
        first = max(shares, key=lambda key: shares[key])
        others = sorted(share for key, share in shares.items() if key != first)
        return [first] if shares[first] >= AHEAD * others[len(others) // 2] else []

    def _fits_without(self, key: str, others: list[str], target: float) -> bool:
        rest = self._predicted(others)
        return not rest or (self._ratio({key: 0.0}, rest) or -1.0) >= target

    def _search(self, keys: Sequence[str], target: float, max_forwards: int) -> float:
        """Find the longest share of these groups' step with the target gain ratio.

        The share is quartered until the ratio is reached; a quadratic gives the share between.
        """
        share, ratio = 1.0, None
        for _ in range(max_forwards):
            share *= 0.25
            ratio = self._ratio(
                dict.fromkeys(keys, share), (self._predicted(keys) or 0.0) * share, keys
            )
            if ratio is None or ratio >= target:
                break
        if ratio is None or ratio >= 1:
            return min(1.0, share * (1.0 if ratio is None else 4.0))
        return min(4 * share, share * (1 - target) / max(1 - ratio, 1e-3))

    def _ratio(
        self, shares: Mapping[str, float], predicted: float, only: Sequence[str] = ()
    ) -> float | None:
        with self._moved(shares, only):
            found = self._change()
        return None if found is None or not predicted else found[0] / predicted

    @contextmanager
    def _moved(self, shares: Mapping[str, float], only: Sequence[str] = ()) -> Iterator[None]:
        """Put groups at a share of their step; with ``only``, others before theirs."""
        moved = []
        try:
            for group in self._groups:
                share = shares.get(group.key, 0.0 if only else 1.0)
                if share == 1.0:
                    continue
                for parameter, before in zip(group.parameters, group.before, strict=True):
                    moved.append((parameter, parameter.detach().clone()))
                    parameter.copy_(torch.lerp(before, parameter.detach(), share))
            yield
        finally:
            for parameter, bits in moved:
                parameter.copy_(bits)

    def _predicted(self, keys: Sequence[str] | None = None) -> float | None:
        parts = [
            each.predicted
            for each in self._groups
            if each.predicted is not None and (keys is None or each.key in keys)
        ]
        total = sum(float(part) for part in parts)
        return total if parts and math.isfinite(total) else None

    def _change(self) -> tuple[float, float] | None:
        """Return the change of the objective, and its size before; None if unknown."""
        before, change = 0.0, 0.0
        for call, objective in self._seen:
            with call.again(self._model) as forward:
                values = objective.values(forward())
            if values is None:
                return None
            old, new = float(values[0]), float(values[1])
            before, change = before + abs(old), change + new - old
        if not self._seen:
            return None
        share = self._forwards / len(self._seen)
        return (change * share, before * share) if math.isfinite(before) else None

    def _too_small(self) -> float:
        """Return the predicted change over the objective that the forward's format hides."""
        if any(enabled for call, _ in self._seen for enabled, _ in call.autocast.values()):
            return _SHORT
        return max(
            _TOO_SMALL.get(each.dtype, _SHORT)
            for each in self._model.parameters()
            if each.is_floating_point()
        )

    def _trained(self) -> list[nn.Parameter]:
        return [each for each in self._model.parameters() if each.grad is not None]


def _norm(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    norm: Tensor = torch.linalg.vector_norm(local(gradient.detach()).float())
    return norm
