"""First gradient of a step that holds a NaN or an inf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.outputs import loss_in
from stabmon._torch.tensors import tensors_in
from stabmon.capture import clean_name
from stabmon.nonfinite.bad_values import count_bad, indices
from stabmon.nonfinite.causes import BeyondExp, HiddenRows, of_values
from stabmon.nonfinite.watched_replay import is_within, module_names, watched
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall, Cause, NonFinite


def find_in_backward(model: nn.Module, calls: Sequence[ForwardCall], step: int) -> NonFinite | None:
    """Replay forwards and backwards, and name the first gradient that is not finite.

    In the order in which backward makes them. Where the loss is not in the model's output, backward
    starts from ones in its place. Accumulates into no ``grad``.

    Args:
        model: the model, with the parameters of the failing step.
        calls: its forwards.
        step: its number.

    Returns:
        The module whose backward made it, and the head where only one head's part of a projection
        is bad; None where all is finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for call in calls:
        trace = _BackwardTrace(step, module_names(model))
        with (
            watched(model, trace.enter, trace.leave, trace.attend),
            call.again(model) as forward,
            torch.enable_grad(),
        ):
            output = forward()
            loss = loss_in(output)
            outputs = tensors_in(output) if loss is None else [loss]
            roots = [each for each in outputs if each.requires_grad]
            if not roots:
                continue
            ones = [torch.ones_like(root) for root in roots]
            gradients = torch.autograd.grad(roots, parameters, ones, allow_unused=True)
        if trace.found is None:
            trace.check_parameters(dict(zip(parameters, gradients, strict=True)), model)
        if trace.found is not None:
            return trace.found
    return None


def find_in_gradients(model: nn.Module, step: int) -> NonFinite | None:
    """Name the module in which a non-finite gradient began.

    Backward runs from the last module to the first and corrupts all it passes on its way.

    Args:
        model: the model, with the gradients of the failing step.
        step: its number.

    Returns:
        The last parameter, in the model's order, whose gradient is not finite, if some later one is
        finite; a record without a layer where all are bad (then the loss was, or clipping has
        spread it); None where all are finite.
    """
    graded = [
        (name, count_bad(parameter.grad))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]
    bad = [(name, detail) for name, detail in graded if detail]
    if not bad:
        return None
    share = f"{len(bad)} of {len(graded)} parameters"
    if len(bad) == len(graded):
        return NonFinite(step, "gradient", None, None, "all gradients", share)
    layer, _, tensor = bad[-1][0].rpartition(".")
    return NonFinite(
        step, "gradient", clean_name(layer), None, f"{tensor}.grad", f"{bad[-1][1]}; {share}"
    )


@dataclass
class _Passed:
    """A tensor that went from one module to the next."""

    tensor: Tensor
    producer: nn.Module | None = None
    consumer: nn.Module | None = None
    """Innermost module that it was handed to."""


@dataclass
class _BackwardTrace:
    """First bad gradient of a replayed backward."""

    step: int
    names: Mapping[nn.Module, str]
    found: NonFinite | None = None
    passed: dict[int, _Passed] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    hidden: dict[str, HiddenRows] = field(default_factory=dict)
    """By layer, rows without a visible key.

    A softmax over none is NaN in backward, whatever stands in its place in forward.
    """
    beyond_exp: list[BeyondExp] = field(default_factory=list)
    """Layers whose hand-written exponentials leave their format.

    Where only their sum does, forward is 0 or finite, and backward is not.
    """

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for tensor in tensors_in((args, kwargs)):
            if passed := self._passed_on(tensor):
                passed.consumer = module

    def leave(self, module: nn.Module, output: Any) -> None:
        for tensor in tensors_in(output):
            if passed := self._passed_on(tensor):
                passed.producer = passed.producer or module

    def attend(self, call: AttentionCall) -> None:
        layer = call.layer.partition("#")[0]
        if call.query is not None:
            self.heads[layer] = call.query.shape[1]
        operator = operator_of(call)
        self.hidden[layer] = HiddenRows.of(layer, operator)
        if exp := BeyondExp.of(call, operator):
            self.beyond_exp.append(exp)

    def check_parameters(
        self, gradients: Mapping[nn.Parameter, Tensor | None], model: nn.Module
    ) -> None:
        """Check the gradients of parameters, where those of activations were all finite."""
        for name, parameter in reversed(list(model.named_parameters())):
            gradient = gradients.get(parameter)
            if gradient is not None and (bad := count_bad(gradient)):
                layer, _, tensor = name.rpartition(".")
                self.found = self._named(clean_name(layer), None, f"{tensor}.grad", gradient, bad)
                return

    def _named(
        self, layer: str, head: int | None, tensor: str, gradient: Tensor, bad: str
    ) -> NonFinite:
        for exp in self.beyond_exp:
            if is_within(layer, exp.layer):
                return NonFinite(
                    self.step, "score", exp.layer, exp.head, "score", exp.detail, "overflow"
                )
        near = (each for each in self.hidden.values() if is_within(layer, each.layer))
        hidden = next(filter(None, (each.explain(gradient) for each in near)), "")
        cause: Cause = "mask" if hidden else of_values(gradient)
        detail = f"{bad}; {hidden}" if hidden else bad
        return NonFinite(self.step, "gradient", layer or None, head, tensor, detail, cause)

    def _passed_on(self, tensor: Tensor) -> _Passed | None:
        # the id of the running backward, -1 outside of one: an activation checkpoint's second
        # forward runs inside (checked with torch 2.13; gone, tracing raises and is reported once)
        if tensor.grad_fn is None or torch._C._current_graph_task_id() != -1:
            return None
        if id(tensor) not in self.passed:
            passed = self.passed[id(tensor)] = _Passed(tensor)
            tensor.register_hook(lambda gradient: self._check(passed, gradient))
        return self.passed[id(tensor)]

    def _check(self, passed: _Passed, gradient: Tensor) -> None:
        if self.found is not None or not (bad := count_bad(gradient)):
            return
        if passed.consumer is not None:
            layer, tensor = self._name(passed.consumer), "input.grad"
        else:
            layer, _, tensor = self._name(passed.producer).rpartition(".")
            tensor = f"{tensor}.output.grad"
        self.found = self._named(layer, self._head(layer, gradient), tensor, gradient, bad)

    def _name(self, module: nn.Module | None) -> str:
        return "" if module is None else self.names.get(module, type(module).__name__)

    def _head(self, layer: str, gradient: Tensor) -> int | None:
        """Return the one head whose part of a projection's output is bad.

        By the layouts in use: q|k|v side by side, or head by head.
        """
        near = (count for name, count in self.heads.items() if is_within(layer, name))
        heads = next(near, 0)
        width = gradient.shape[-1] if gradient.dim() else 0
        if not heads or not width or width % heads:
            return None
        bad = (~gradient.isfinite()).flatten(0, -2).any(dim=0)
        found = set()
        for parts in {1, 3} if width % (3 * heads) == 0 else {1}:
            alone = indices(bad.unflatten(0, (parts, heads, -1)).any(dim=2).any(dim=0))
            found |= {alone[0]} if len(alone) == 1 else set()
        return found.pop() if len(found) == 1 else None
