"""Find the first tensor of a step that holds a NaN or an inf, by replaying the step's forwards with
every module watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.outputs import loss_in
from stabmon._torch.tensors import local, tensors_in
from stabmon.capture import AttentionCapture, clean_name
from stabmon.nonfinite.causes import HiddenRows, of_input, of_values, unused_labels
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall, Cause, NonFinite


def find_in_forward(model: nn.Module, calls: Sequence[ForwardCall], step: int) -> NonFinite | None:
    """Replay the forwards of a step and name the first parameter, input, activation or attention
    score that is not finite.

    To be called before the optimizer's step, on any rank by itself, while parameters are those of
    the failing forward. Leaves the model, its buffers and the random generators as they were; keeps
    no hook. A lone -inf counts for nothing: it hides keys.

    Returns:
        What was found first in the order of execution, with the head where attention shows that
        only some are bad; None where all is finite.
    """
    trace = _ForwardTrace(step, _names(model))
    with _watched(model, trace.enter, trace.leave, trace.attend):
        for call in calls:
            for name, tensor in call.inputs():
                if bad := count_odd(tensor):
                    trace.note("input", None, name, detail=bad, cause=of_input(call, name))
            with call.again(model) as forward:
                loss = loss_in(forward())
            if loss is not None and (bad := count_bad(loss)):
                unused = unused_labels(call)
                trace.note(
                    "loss",
                    None,
                    "loss",
                    detail=unused or bad,
                    cause="labels" if unused else "objective",
                )
            if trace.found is not None:
                break
    return trace.found


def find_in_backward(model: nn.Module, calls: Sequence[ForwardCall], step: int) -> NonFinite | None:
    """Replay forwards and backwards, and name the first gradient that is not finite, in the order
    in which backward makes them.

    Where the loss is not in the model's output, backward starts from ones in its place. Accumulates
    into no ``grad``.

    Returns:
        The module whose backward made it, and the head where only one head's part of a projection
        is bad; None where all is finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for call in calls:
        trace = _BackwardTrace(step, _names(model))
        with (
            _watched(model, trace.enter, trace.leave, trace.attend),
            call.again(model) as forward,
            torch.enable_grad(),
        ):
            output = forward()
            loss = loss_in(output)
            roots = [
                each
                for each in ([loss] if loss is not None else tensors_in(output))
                if each.requires_grad
            ]
            if not roots:
                continue
            ones = [torch.ones_like(root) for root in roots]
            gradients = torch.autograd.grad(roots, parameters, ones, allow_unused=True)
        if trace.found is None:
            trace.check_parameters(dict(zip(parameters, gradients, strict=True)), model)
        if trace.found is not None:
            return trace.found
    return None


def find_in_weights(model: nn.Module, step: int) -> NonFinite | None:
    """Name the first parameter, in the model's order, that is not finite; None where all are."""
    for name, parameter in model.named_parameters():
        if bad := count_bad(parameter):
            layer, _, tensor = name.rpartition(".")
            return NonFinite(
                step,
                "parameter",
                clean_name(layer) or type(model).__name__,
                None,
                tensor,
                bad,
                "weights",
            )
    return None


def find_in_gradients(model: nn.Module, step: int) -> NonFinite | None:
    """Name where a non-finite gradient began: backward runs from the last module to the first and
    spoils all it passes on its way.

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
class _ForwardTrace:
    """The first bad tensor of a replay, and whether attention has since told which head it belongs
    to.
    """

    step: int
    names: Mapping[nn.Module, str]
    found: NonFinite | None = None
    suspect: NonFinite | None = None
    """A score too large for the format in which the model's kernel forms it; blamed if something
    bad comes next.
    """
    attention: tuple[str, int] = ("", 1)
    """The layer that attended last, and its heads."""
    hidden: HiddenRows = field(default_factory=HiddenRows)
    """Rows of that layer which see no key."""

    def note(
        self,
        kind: Any,
        layer: str | None,
        tensor: str,
        head: int | None = None,
        detail: str = "",
        cause: Cause = "",
    ) -> None:
        if self.found is None:
            near = (
                self.suspect is not None
                and layer is not None
                and _within(layer, self.suspect.layer)
            )
            self.found = (
                self.suspect
                if near
                else NonFinite(self.step, kind, layer, head, tensor, detail, cause)
            )

    def note_activation(
        self, module: nn.Module, name: str, tensor: Tensor, side: str, bad: str
    ) -> None:
        """A tensor that goes into or out of a module, where all before it was finite."""
        if self.found is not None:
            return
        hidden = (
            self.hidden.explain(tensor)
            if _within(name, self.hidden.layer) or side == "input"
            else ""
        )
        cause: Cause = "mask" if hidden else of_values(tensor, [module])
        self.note(
            "activation", name, side, detail=f"{bad}; {hidden}" if hidden else bad, cause=cause
        )

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = self.names.get(module, type(module).__name__)
        for tensor in tensors_in((args, kwargs)):
            if bad := count_odd(tensor):
                self.note_activation(module, name, tensor, "input", bad)
                self._tell_head(name, tensor)
        if self.found is None:
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if bad := count_bad(parameter):
                    self.note("parameter", name, parameter_name, detail=bad, cause="weights")

    def leave(self, module: nn.Module, output: Any) -> None:
        if self.found is None:
            for tensor in tensors_in(output):
                if tensor.dim() and (bad := count_odd(tensor)):
                    self.note_activation(
                        module, self.names.get(module, type(module).__name__), tensor, "output", bad
                    )

    def attend(self, call: AttentionCall) -> None:
        layer, self.suspect = call.layer.partition("#")[0], None
        operator = operator_of(call)
        self.attention, self.hidden = (layer, operator.heads), HiddenRows.of(layer, operator)
        for name, tensor in (("query", call.query), ("key", call.key)):
            heads = [] if tensor is None else bad_heads(tensor)
            if tensor is not None and heads:
                only = (
                    heads[0] * operator.heads // tensor.shape[1]
                    if len(heads) < tensor.shape[1]
                    else None
                )
                self.note("activation", layer, name, only, count_bad(tensor), of_values(tensor))
                self._set_head(layer, only)
                return
        if self.found is not None:
            return
        operator.prepare(["max_score", "log_partition"])
        largest, occupied = operator.max_score(), operator.occupied
        bad = (largest.isnan() | largest.isposinf() | operator.log_partition().isnan()) & occupied
        if heads := bad.any(dim=(0, 2)).nonzero().flatten().tolist():
            broken = (
                call.mask is not None and call.mask.is_floating_point() and count_odd(call.mask)
            )
            detail = f"{int(bad.sum())} rows in {len(heads)} heads" + (
                f"; the mask holds {broken}" if broken else ""
            )
            self.note("score", layer, "score", heads[0], detail, "mask" if broken else "overflow")
        elif not call.fused:
            limit = torch.finfo(call.dtype).max
            unscaled = (largest / min(1.0, call.scale)).masked_fill(~occupied, 0).amax(dim=(0, 2))
            if float(unscaled.max()) > limit:
                detail = f"{float(unscaled.max()):.4g} before scaling, {call.dtype} ends at {limit:.4g}".replace(
                    "torch.", ""
                )
                self.suspect = NonFinite(
                    self.step, "score", layer, int(unscaled.argmax()), "score", detail, "overflow"
                )

    def _tell_head(self, name: str, tensor: Tensor) -> None:
        """What a module of the layer gets after it has attended, as its output projection does,
        holds the heads side by side.
        """
        layer, heads = self.attention
        if (
            not _within(name, layer)
            or name == layer
            or not tensor.dim()
            or tensor.shape[-1] % heads
        ):
            return
        bad = (~tensor.isfinite()).flatten(0, -2).any(dim=0).unflatten(0, (heads, -1)).any(dim=1)
        if not bool(bad.all()):
            self._set_head(layer, int(bad.nonzero()[0]))

    def _set_head(self, layer: str, head: int | None) -> None:
        if (
            head is not None
            and self.found is not None
            and self.found.head is None
            and _within(self.found.layer, layer)
        ):
            self.found = replace(self.found, head=head)


@dataclass
class _Passed:
    """A tensor that went from one module to the next."""

    tensor: Tensor
    producer: nn.Module | None = None
    consumer: nn.Module | None = None
    """The innermost that it was handed to."""


@dataclass
class _BackwardTrace:
    """The first bad gradient of a replayed backward."""

    step: int
    names: Mapping[nn.Module, str]
    found: NonFinite | None = None
    passed: dict[int, _Passed] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    hidden: dict[str, HiddenRows] = field(default_factory=dict)
    """By layer, rows which see no key: a softmax over none of them is NaN in backward, whatever
    stands in its place in forward.
    """

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for tensor in tensors_in((args, kwargs)):
            if passed := self._follow(tensor):
                passed.consumer = module

    def leave(self, module: nn.Module, output: Any) -> None:
        for tensor in tensors_in(output):
            if passed := self._follow(tensor):
                passed.producer = passed.producer or module

    def attend(self, call: AttentionCall) -> None:
        layer = call.layer.partition("#")[0]
        if call.query is not None:
            self.heads[layer] = call.query.shape[1]
        self.hidden[layer] = HiddenRows.of(layer, operator_of(call))

    def check_parameters(
        self, gradients: Mapping[nn.Parameter, Tensor | None], model: nn.Module
    ) -> None:
        """Look at the gradients of parameters, where those of activations were all finite."""
        for name, parameter in reversed(list(model.named_parameters())):
            gradient = gradients.get(parameter)
            if gradient is not None and (bad := count_bad(gradient)):
                layer, _, tensor = name.rpartition(".")
                self.found = self._named(clean_name(layer), None, f"{tensor}.grad", gradient, bad)
                return

    def _named(
        self, layer: str, head: int | None, tensor: str, gradient: Tensor, bad: str
    ) -> NonFinite:
        near = [
            each.explain(gradient) for each in self.hidden.values() if _within(layer, each.layer)
        ]
        hidden = next(filter(None, near), "")
        cause: Cause = "mask" if hidden else of_values(gradient)
        return NonFinite(
            self.step,
            "gradient",
            layer or None,
            head,
            tensor,
            f"{bad}; {hidden}" if hidden else bad,
            cause,
        )

    def _follow(self, tensor: Tensor) -> _Passed | None:
        if (
            tensor.grad_fn is None or torch._C._current_graph_task_id() != -1
        ):  # an activation checkpoint's second forward
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
        """The one head whose part of a projection's output is bad, by the layouts in use: q|k|v
        side by side, or head by head.
        """
        heads = next(
            (count for attending, count in self.heads.items() if _within(layer, attending)), 0
        )
        width = gradient.shape[-1] if gradient.dim() else 0
        if not heads or not width or width % heads:
            return None
        bad = (~gradient.isfinite()).flatten(0, -2).any(dim=0)
        found = set()
        for parts in {1, 3} if width % (3 * heads) == 0 else {1}:
            alone = (
                bad.unflatten(0, (parts, heads, -1))
                .any(dim=2)
                .any(dim=0)
                .nonzero()
                .flatten()
                .tolist()
            )
            found |= {alone[0]} if len(alone) == 1 else set()
        return found.pop() if len(found) == 1 else None


def _names(model: nn.Module) -> dict[nn.Module, str]:
    return {
        module: clean_name(name) or type(module).__name__ for name, module in model.named_modules()
    }


def _within(name: str | None, layer: str | None) -> bool:
    """Whether a module's name is that of ``layer`` or of something in it."""
    return (
        name is not None and layer is not None and (name == layer or name.startswith(layer + "."))
    )


@contextmanager
def _watched(
    model: nn.Module,
    enter: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None],
    leave: Callable[[nn.Module, Any], None],
    attend: Callable[[AttentionCall], None],
) -> Iterator[None]:
    """Show every module's inputs, outputs and attention calls; all hooks are taken out again."""
    with ExitStack() as stack:
        for module in model.modules():
            before = module.register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(before.remove)
            after = module.register_forward_hook(lambda module, _, output: leave(module, output))
            stack.callback(after.remove)
        stack.enter_context(
            AttentionCapture(model, attend, always_watch_functions=True, at_once=True)
        )
        yield


def count_bad(tensor: Tensor) -> str:
    """``"3 NaN, 1 inf of 64"``, or the empty string where every value is finite. Of a sharded
    tensor, this rank's part.
    """
    tensor = local(tensor.detach())
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return ""
    counts = ((int(tensor.isnan().sum()), "NaN"), (int(tensor.isinf().sum()), "inf"))
    return f"{', '.join(f'{count} {what}' for count, what in counts if count)} of {tensor.numel()}"


def count_odd(tensor: Tensor) -> str:
    """The same for what goes into and out of modules, where -inf by itself counts for nothing: it
    hides keys.
    """
    tensor = local(tensor.detach())
    return (
        count_bad(tensor.masked_fill(tensor == -torch.inf, 0)) if tensor.is_floating_point() else ""
    )


def bad_heads(tensor: Tensor) -> list[int]:
    """Heads of ``[B, H, S, D]`` that hold a value that is not finite."""
    heads: list[int] = (
        (~tensor.isfinite()).any(dim=-1).any(dim=-1).any(dim=0).nonzero().flatten().tolist()
    )
    return heads
