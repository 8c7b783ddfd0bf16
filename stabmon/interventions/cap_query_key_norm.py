"""Ceilings on the norms of the weights that make a layer's queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from stabmon._settings import Factor, Fraction
from stabmon._storage.stored_value import Stored
from stabmon._torch.tensors import is_sharded
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect, HeldEffect
from stabmon.interventions.run.healthy_states import HealthyStates
from stabmon.interventions.run.snapshots import Snapshot
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.head_layouts import SEPARATE
from stabmon.projections.head_rows import Rows
from stabmon.projections.locate import find_query_key
from stabmon.projections.not_applicable import NotApplicable
from stabmon.projections.scaling import ScaledRows, check_saved_rows
from stabmon.rules.evidence.norm_growth import sustained_growth


@intervention
@dataclass(frozen=True)
class CapQueryKeyNorm(Intervention):
    r"""Hold each head's norms of W_q and W_k in bounds.

    After every optimizer step each piece w (one head's rows of W_q, W_k or one of their biases)
    becomes :math:`w \cdot \min(1, \kappa / \|w\|)`, as long as this is held.

    It mitigates sustained growth of the weights (``logit_growth`` of a layer). It removes the
    growth and nothing else: each piece has a ceiling of its own, so that a growing bias does not
    pull the weights down with it, and the direction of each piece stays free. The other parts of a
    step and the optimizer's moments are not changed: see ``qk_clip``.

    The ceiling :math:`\kappa` is ``times`` the piece's norm when the growth began. That norm is
    estimated from the newest healthy state, where one is kept (see ``rollback``): the piece's norm
    there, times the growth of the layer's norm between the two steps. Without such a state
    :math:`\kappa` is the present norm, or ``times`` that if ``times`` is below 1. Layers that grow
    alike are held together with those that the issues name.

    Example:
        >>> CapQueryKeyNorm(times=2.0).settings
        {'times': 2.0, 'least': 0.1}

    References:
        Franke et al. 2023, arXiv:2311.09058: a bound on the norm of each weight matrix.
    """

    treats: ClassVar[Mapping[str, int]] = {"sustained_growth": 10}

    times: Factor = 1.4
    """Ceiling of a piece, as a multiple of its own past norm.

    At 1.4 scores may reach about twice their past, which cost repaired runs nothing under
    ``qk_clip``.
    """
    least: Fraction = 0.1
    """Norm that every piece may reach, as a share in [0, 1] of the layer's mean piece.

    It lets a bias learn that was zero.
    """

    def _start(self, run: TrainingRun) -> Effect:
        if all(issue.evidence.get("by") == "scale" for issue in self.issues) and self.issues:
            raise NotApplicable(
                "the scale of the scores grows, not the weights of queries and keys"
            )
        named = [issue.layer.partition("#")[0] for issue in self.issues if issue.layer is not None]
        alike = [
            layer.partition("#")[0]
            for layer in run.known_layers()
            if sustained_growth(run.history, layer, grown=1.2, coherence=0.5) is not None
        ]
        since = min(
            (int(i.evidence["since_step"]) for i in self.issues if "since_step" in i.evidence),
            default=run.step,
        )
        states = run.find_prepared(HealthyStates)
        healthy = None if states is None else states.newest
        caps: dict[str, list[float]] = {}
        refused: list[NotApplicable] = []
        for layer in dict.fromkeys([*named, *alike] if named else run.known_layers()):
            try:
                caps[layer] = self._caps(run, layer, since, healthy)
            except NotApplicable as error:
                refused.append(error.with_traceback(None))
        if not caps:
            raise refused[0] if refused else NotApplicable("no attention layer is known")
        held = _Held(run, caps)
        held.note = "; ".join(f"left out: {error.reason}" for error in refused)
        return held

    def check_saved(self, effect: Stored) -> None:
        _ = [cap.number() for _, caps in effect["caps"].items() for cap in caps.parts()]
        check_saved_rows(effect["rows"])

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        held = _Held(
            run,
            {str(layer): [float(cap) for cap in caps] for layer, caps in state["caps"].items()},
            now=False,
        )
        held.rows.load(state["rows"])
        return held

    def _caps(
        self, run: TrainingRun, layer: str, since: int, healthy: Snapshot | None
    ) -> list[float]:
        """Return the ceiling on the norm of each piece of a layer."""
        pieces = _pieces(run, layer)
        norms = {
            r.step: r.query_key[layer].weight for r in run.history.readings if layer in r.query_key
        }
        names = {id(parameter): name for name, parameter in run.model.named_parameters()}
        then = norms.get(since, math.nan)
        if (
            healthy is None
            or not math.isfinite(then)
            or any(names.get(id(p.parameter)) not in healthy.tensors for p in pieces)
        ):
            return [max(min(self.times, 1.0) * norm, 1e-12) for norm in _norms(pieces)]
        saved = [healthy.tensors[names[id(p.parameter)]] for p in pieces]
        grown = then / max(
            math.hypot(
                *(
                    p.view(tensor).float().norm().item()
                    for p, tensor in zip(pieces, saved, strict=True)
                )
            ),
            1e-12,
        )
        past = _norms(pieces, saved)
        least = self.least * math.hypot(*past) / len(past) ** 0.5
        return [self.times * max(norm, least) * grown for norm in past]


class _Held(HeldEffect):
    """The ceilings of several layers, and the rows scaled so far."""

    def __init__(
        self, run: TrainingRun, caps: Mapping[str, Sequence[float]], *, now: bool = True
    ) -> None:
        self.run, self.caps = run, caps
        self._pieces = [
            (piece, cap)
            for layer, own in caps.items()
            for piece, cap in zip(_pieces(run, layer), own, strict=True)
        ]
        self.rows = ScaledRows(run)
        before = {layer: _layer_norm(run, layer) for layer in caps}
        if now:
            try:
                self._scale()
            except BaseException:
                self.rows.undo()
                raise
        super().__init__(
            places=[(layer, None) for layer in caps],
            before={"query_key_norm": before},
            after={"query_key_norm": {layer: _layer_norm(run, layer) for layer in caps}},
            resources=frozenset(f"scores of {layer}" for layer in caps),
        )
        # First: a held clip then acts only on the scores that are still too large.
        self._remove = [run.step_hooks.add("on_step", self._on_step, first=True)]

    def undo(self) -> bool:
        self.release()
        return self.rows.undo()

    def rolled_back(self, step: int) -> Callable[[], None]:
        return self.rows.rolled_back(step)

    def state_dict(self) -> dict[str, Any]:
        names = {id(p): name for name, p in self.rows.run.model.named_parameters()}
        return {
            "caps": {layer: list(own) for layer, own in self.caps.items()},
            "rows": self.rows.state(names),
        }

    def _on_step(self) -> None:
        self.rows.moved_on()
        self._scale()

    def _scale(self) -> None:
        norms = _norms([piece for piece, _ in self._pieces])
        edits = [
            (piece, cap / norm)
            for (piece, cap), norm in zip(self._pieces, norms, strict=True)
            if cap < norm < math.inf  # NaN and inf are left to other interventions
        ]
        if edits:
            self.run.note_edit()
        self.rows.scale(edits)
        self._bound |= bool(edits)


def _pieces(run: TrainingRun, layer: str) -> list[Rows]:
    """Return each head's rows of each parameter behind the layer's queries and keys."""
    pieces = find_query_key(run.module(layer), run.history.info.get(layer))[0].all_rows()
    if not pieces:
        raise NotApplicable(f"no rows of {layer} are known to make queries or keys", SEPARATE)
    if any(is_sharded(piece.parameter) for piece in pieces):
        raise NotApplicable(f"the parameters of {layer} are sharded")
    return pieces


@torch.no_grad()
def _norms(pieces: Sequence[Rows], tensors: Sequence[Tensor] | None = None) -> list[float]:
    """Return the L2 norm of each piece as the model uses it.

    With ``tensors``, these are read instead of the parameters. It costs one transfer to the host
    for each device.
    """
    views = [
        piece.view(t).detach().float()
        for piece, t in zip(pieces, tensors or [p.parameter for p in pieces], strict=True)
    ]
    # Private: one L2 norm a tensor in few kernels, mixed shapes and devices (checked with torch
    # 2.13). If it goes, torch.linalg.vector_norm of each view returns the same.
    norms = torch._foreach_norm(
        [view + p.offset if p.offset else view for p, view in zip(pieces, views, strict=True)]
    )
    devices = dict.fromkeys(norm.device for norm in norms)
    found = {
        device: iter(torch.stack([norm for norm in norms if norm.device == device]).tolist())
        for device in devices
    }
    return [next(found[norm.device]) for norm in norms]


def _layer_norm(run: TrainingRun, layer: str) -> float:
    """Return the L2 norm of everything that makes the layer's queries and keys."""
    return math.hypot(*_norms(_pieces(run, layer)))
