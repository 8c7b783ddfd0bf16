"""Measure the weights of each part of a model from one sampled step to the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._storage.stored_value import Stored
from stabmon._torch.tensors import local
from stabmon.capture.names import clean_name
from stabmon.records import PartChange


class PartChanges:
    """L2 norms of the weights of each part, after a sampled step and before the next.

    The parts are attention layers, the modules beside each in its block, and modules outside of
    blocks. Weights that other than the optimizer's steps have multiplied show by a ratio of the two
    norms that the steps in between cannot make. Of sharded parameters the part on this rank is
    taken. Costs two calls for the norms of all trained weights a sampled step, and one transfer to
    the host.

    Args:
        model: the model that trains.
        edited: returns the attention layers that held interventions edit at every step; nothing is
            known of their weights in between.
    """

    def __init__(
        self, model: nn.Module, edited: Callable[[], Collection[str] | None] = lambda: ()
    ) -> None:
        self._model, self._edited = model, edited
        self._parts: dict[int, str] = {}
        self._layers: tuple[str, ...] = ()
        self._trained: list[nn.Parameter] = []
        self._was: Tensor | None = None
        self._now: Tensor | None = None
        self.owes_end = False
        """The newest step was sampled, and :meth:`note_end` is to come."""

    def name_of(self, parameter: Tensor) -> str:
        """Return the part that a parameter is in, once :meth:`before` was called; else empty."""
        return self._parts.get(id(parameter), "")

    def before(self, layers: Collection[str]) -> None:
        """Measure the weights before the optimizer of a sampled step.

        Args:
            layers: the attention layers.
        """
        if tuple(layers) != self._layers or not self._parts:
            self._layers = tuple(layers)
            self._parts = parts_of(self._model, layers)
        self._now = self._norms()

    def after(self, updates: Mapping[str, float]) -> dict[str, PartChange]:
        """Return the changes of all parts by name; empty where :meth:`before` was not called.

        Args:
            updates: relative update of each part by the step.
        """
        now, was = self._now, self._was
        self._now = self._was = None
        if now is None:
            return {}
        if was is not None:
            was = was.to(now.device)
        if was is None or was.shape != now.shape:
            was = torch.full_like(now, math.nan)
        table = torch.stack([now, was]).tolist()
        squares: dict[str, list[float]] = {}
        for parameter, new, old in zip(self._trained, *table, strict=True):
            sums = squares.setdefault(self._parts[id(parameter)], [0.0, 0.0])
            sums[0] += new * new
            sums[1] += old * old
        edited = set(self._edited() or ())
        return {
            part: PartChange(
                weight=math.sqrt(new),
                before=math.nan if part in edited else math.sqrt(old),
                update=updates.get(part, math.nan),
            )
            for part, (new, old) in squares.items()
        }

    def note_end(self) -> None:
        """Measure the weights after a sampled step and all that was done at it."""
        self._was = self._norms() if self._parts else None
        self.owes_end = False

    def rolled_back(self, step: int) -> None:
        """Drop the weights: the run goes on from the state after ``step``."""
        self._was = None

    def state_dict(self) -> dict[str, Any]:
        """Return the norms after the newest sampled step, as plain values.

        A checkpoint is written before the next step begins.
        """
        if self.owes_end:
            self.note_end()
        return {"norms": None if self._was is None else self._was.tolist()}

    def parse_state(self, state: Any) -> Callable[[], None]:
        """Read a state whole, and return a function that restores it.

        Raises:
            ValueError: if it is no state of this object.
        """
        saved = Stored.of(state)
        if not saved.value:  # a run of an earlier version
            return lambda: self.rolled_back(0)
        norms = saved["norms"].maybe(lambda each: [float(n.number()) for n in each.parts()])

        def restore() -> None:
            self._was = None if norms is None else torch.tensor(norms)

        return restore

    @torch.no_grad()
    def _norms(self) -> Tensor | None:
        self._trained = [each for each in self._model.parameters() if id(each) in self._parts]
        weights = [local(each.detach()) for each in self._trained]
        if not weights:
            return None
        narrow = any(each.element_size() < 4 for each in weights)
        # torch._foreach_norm: one launch for all tensors (checked with torch 2.13)
        norms = torch._foreach_norm(weights, 2, torch.float32 if narrow else None)
        return torch.stack([each.to(norms[0].device).float() for each in norms])


def parts_of(model: nn.Module, layers: Collection[str]) -> dict[int, str]:
    """Return the name of the part that each trained parameter is in, by ``id``.

    Args:
        model: the model.
        layers: its attention layers; a later call of a layer counts as the layer.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2)
        >>> sorted(set(parts_of(model, ["self_attn"]).values()))
        ['linear1', 'linear2', 'norm1', 'norm2', 'self_attn']
    """
    attention = {layer.partition("#")[0] for layer in layers}
    blocks = {layer.rpartition(".")[0] for layer in attention} - {""}
    return {
        id(parameter): _part(clean_name(name), attention, blocks)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }


def _part(name: str, attention: Collection[str], blocks: Collection[str]) -> str:
    above = [name[:at] for at, letter in enumerate(name) if letter == "."]
    for prefix in above:
        if prefix in attention:
            return prefix
    block = next((prefix for prefix in reversed(above) if prefix in blocks), None)
    if block is not None:
        return ".".join(name.split(".")[: block.count(".") + 2])
    return above[-1] if above else name
