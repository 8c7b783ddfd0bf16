"""First tensor of a step that holds a NaN or an inf, by a replay of its forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.number_formats import format_of
from stabmon._torch.outputs import loss_in
from stabmon._torch.tensors import tensors_in
from stabmon.capture import clean_name
from stabmon.nonfinite.bad_values import bad_heads, count_bad, count_visible_bad, indices
from stabmon.nonfinite.causes import BeyondExp, HiddenRows, of_input, of_values, unused_labels
from stabmon.nonfinite.watched_replay import is_within, module_names, watched
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall, Cause, NonFinite


def find_in_forward(model: nn.Module, calls: Sequence[ForwardCall], step: int) -> NonFinite | None:
    """Replay the forwards of a step and name the first tensor that is not finite.

    A parameter, input, activation or attention score. To be called before the optimizer's step, on
    any rank by itself, while parameters are those of the failing forward. Leaves the model, its
    buffers and the random generators as they were; keeps no hook. A lone -inf does not count: it
    hides keys.

    Args:
        model: the model, with the parameters of the failing step.
        calls: its forwards.
        step: its number.

    Returns:
        The finding, in the order of execution, with the head where attention shows that only some
        are bad; None where all is finite.
    """
    trace = _ForwardTrace(step, module_names(model))
    with watched(model, trace.enter, trace.leave, trace.attend):
        for call in calls:
            for name, tensor in call.inputs():
                if bad := count_visible_bad(tensor):
                    trace.note("input", None, name, detail=bad, cause=of_input(call, name))
            with call.again(model) as forward:
                loss = loss_in(forward())
            if loss is not None and (bad := count_bad(loss)):
                unused = unused_labels(call)
                cause: Cause = "labels" if unused else "objective"
                trace.note("loss", None, "loss", detail=unused or bad, cause=cause)
            if trace.found is not None:
                break
    return trace.found


def find_in_weights(model: nn.Module, step: int) -> NonFinite | None:
    """Name the first parameter, in the model's order, that is not finite.

    Args:
        model: the model.
        step: number of the step, for the record.

    Returns:
        None where all are finite.
    """
    for name, parameter in model.named_parameters():
        if bad := count_bad(parameter):
            layer, _, tensor = name.rpartition(".")
            owner = clean_name(layer) or type(model).__name__
            return NonFinite(step, "parameter", owner, None, tensor, bad, "weights")
    return None


NO_ATTENTION = ("", 1)
"""Layer and heads where no heads stand side by side."""


@dataclass
class _ForwardTrace:
    """First bad tensor of a replay, and the head it belongs to by later attention."""

    step: int
    names: Mapping[nn.Module, str]
    found: NonFinite | None = None
    suspect: NonFinite | None = None
    """Score too large for the format in which the model's kernel forms it.

    The finding is attributed to it if a bad value comes next.
    """
    attention: tuple[str, int] = NO_ATTENTION
    """Layer that attended last, and its heads."""
    hidden: HiddenRows = field(default_factory=HiddenRows)
    """Rows of that layer without a visible key."""

    def note(
        self,
        kind: Any,
        layer: str | None,
        tensor: str,
        head: int | None = None,
        detail: str = "",
        cause: Cause = "",
    ) -> None:
        """Note a bad tensor, if it is the first; or the suspect right before it."""
        if self.found is not None:
            return
        if self.suspect is not None and is_within(layer, self.suspect.layer):
            self.found = self.suspect
        else:
            self.found = NonFinite(self.step, kind, layer, head, tensor, detail, cause)

    def note_activation(
        self, module: nn.Module, name: str, tensor: Tensor, side: str, bad: str
    ) -> None:
        """Note a bad input or output of a module, where all before it was finite."""
        if self.found is not None:
            return
        near = side == "input" or is_within(name, self.hidden.layer)
        hidden = self.hidden.explain(tensor) if near else ""
        cause: Cause = "mask" if hidden else of_values(tensor, [module])
        detail = f"{bad}; {hidden}" if hidden else bad
        self.note("activation", name, side, detail=detail, cause=cause)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = self.names.get(module, type(module).__name__)
        for tensor in tensors_in((args, kwargs)):
            if bad := count_visible_bad(tensor):
                self.note_activation(module, name, tensor, "input", bad)
                self._assign_head(name, tensor)
        if self.found is None:
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if bad := count_bad(parameter):
                    self.note("parameter", name, parameter_name, detail=bad, cause="weights")

    def leave(self, module: nn.Module, output: Any) -> None:
        name = self.names.get(module, type(module).__name__)
        layer, _ = self.attention
        if is_within(name, layer) and name != layer and module._parameters:
            self.attention = NO_ATTENTION  # a projection has mixed the heads
        if self.found is not None:
            return
        for tensor in tensors_in(output):
            if tensor.dim() and (bad := count_visible_bad(tensor)):
                self.note_activation(module, name, tensor, "output", bad)

    def attend(self, call: AttentionCall) -> None:
        layer, self.suspect = call.layer.partition("#")[0], None
        operator = operator_of(call)
        self.attention, self.hidden = (layer, operator.heads), HiddenRows.of(layer, operator)
        for name, tensor in (("query", call.query), ("key", call.key)):
            heads = [] if tensor is None else bad_heads(tensor)
            if tensor is not None and heads:
                every = len(heads) == tensor.shape[1]
                only = None if every else heads[0] * operator.heads // tensor.shape[1]
                self.note("activation", layer, name, only, count_bad(tensor), of_values(tensor))
                self._set_head(layer, only)
                return
        if self.found is not None:
            return
        operator.prepare(["max_score", "log_partition"])
        largest, occupied = operator.max_score(), operator.occupied
        bad = (largest.isnan() | largest.isposinf() | operator.log_partition().isnan()) & occupied
        if heads := indices(bad.any(dim=(0, 2))):
            broken = "" if call.mask is None else count_visible_bad(call.mask)
            detail = f"{int(bad.sum())} rows in {len(heads)} heads"
            detail += f"; the mask holds {broken}" if broken else ""
            self.note("score", layer, "score", heads[0], detail, "mask" if broken else "overflow")
        elif exp := BeyondExp.of(call, operator):
            self.suspect = NonFinite(
                self.step, "score", layer, exp.head, "score", exp.detail, "overflow"
            )
        elif not call.fused:
            limit = torch.finfo(call.dtype).max
            unscaled = (largest / min(1.0, call.scale)).masked_fill(~occupied, 0).amax(dim=(0, 2))
            if float(unscaled.max()) > limit:
                ends = f"{format_of(call.dtype)} ends at {limit:.4g}"
                detail = f"{float(unscaled.max()):.4g} before scaling, {ends}"
                head = int(unscaled.argmax())
                self.suspect = NonFinite(
                    self.step, "score", layer, head, "score", detail, "overflow"
                )

    def _assign_head(self, name: str, tensor: Tensor) -> None:
        """Assign the finding to a head, from the input of a module after attention.

        The output projection gets the heads side by side.
        """
        layer, heads = self.attention
        inside = is_within(name, layer) and name != layer
        if not inside or not tensor.dim() or tensor.shape[-1] % heads:
            return
        bad = (~tensor.isfinite()).flatten(0, -2).any(dim=0).unflatten(0, (heads, -1)).any(dim=1)
        if not bool(bad.all()):
            self._set_head(layer, int(bad.nonzero()[0]))

    def _set_head(self, layer: str, head: int | None) -> None:
        if head is None or self.found is None or self.found.head is not None:
            return
        if is_within(self.found.layer, layer):
            self.found = replace(self.found, head=head)
