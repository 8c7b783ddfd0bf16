"""Find the first tensor of a step that holds a NaN or an inf, by replaying the step's batch with every module watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.capture import AttentionCapture, clean_name
from stabmon.capture.shadow import traceless
from stabmon.records import AttentionCall, NonFinite
from stabmon.signals.measure import operator_of


@dataclass(frozen=True)
class RandomState:
    """The global random generators of torch on the CPU and on the current CUDA device."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """The state at this moment; costs microseconds and no device synchronisation."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)

    def restore(self) -> None:
        """Set the generators back to this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@dataclass(frozen=True)
class ForwardCall:
    """An outermost call into the model, with all it takes to make it again."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random_state: RandomState


@dataclass
class _Trace:
    """The first bad tensor of a replay, and whether attention has since told which head it belongs to."""

    step: int
    model: nn.Module
    names: dict[nn.Module, str] = field(default_factory=dict)
    found: NonFinite | None = None

    def note(self, kind: Any, layer: str | None, tensor: str, head: int | None = None, detail: str = "") -> None:
        if self.found is None:
            self.found = NonFinite(self.step, kind, layer, head, tensor, detail)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.found is None:
            for name, parameter in module.named_parameters(recurse=False):
                if bad := count_bad(parameter):
                    self.note("parameter", self.names[module], name, detail=bad)

    def leave(self, module: nn.Module, output: Any) -> None:
        if self.found is None:
            for tensor in tensors_in(output):
                if bad := count_bad(tensor):
                    self.note("activation", self.names[module], "output", detail=bad)
                    return

    def attend(self, call: AttentionCall) -> None:
        layer = call.layer
        inputs = {"query": call.query, "key": call.key}
        for name, tensor in inputs.items():
            heads = [] if tensor is None else bad_heads(tensor)
            if not heads or tensor is None:
                continue
            only = heads[0] * (1 if name == "query" or call.query is None else call.query.shape[1] // tensor.shape[1])
            some = len(heads) < tensor.shape[1]
            if self.found is None:
                self.note("activation", layer, name, only if some else None, count_bad(tensor))
            elif some and self.found.head is None and self.found.layer and self.found.layer.startswith(layer.split("#")[0]):
                self.found = replace(self.found, head=only)
            return
        if self.found is None:
            operator = operator_of(call)
            operator.prepare(["max_score", "log_partition"])
            bad = (~operator.max_score().isfinite() | operator.log_partition().isnan()) & operator.occupied
            heads = bad.any(dim=(0, 2)).nonzero().flatten().tolist()
            if heads:
                self.note("score", layer, "score", heads[0], f"{int(bad.sum())} rows in {len(heads)} heads")


def find_in_forward(model: nn.Module, calls: Sequence[ForwardCall], step: int) -> NonFinite | None:
    """Replay the forwards of a step and name the first parameter, input, activation or attention score that is not finite.

    To be called before the optimizer's step, on any rank by itself, while parameters are those of the failing forward. Leaves the
    model, its buffers and the random generators as they were; keeps no hook.

    Raises:
        RuntimeError: for a sharded model (FSDP), whose forward needs all ranks.

    Returns:
        What was found first in the order of execution, with the head where attention shows that only some are bad;
        None where all is finite.
    """
    if any(type(parameter).__name__ == "DTensor" or "FSDP" in type(parameter).__name__ for parameter in model.parameters()):
        raise RuntimeError("the model is sharded: one rank cannot replay a batch by itself")
    trace = _Trace(step, model)
    with watch_modules(model, trace), torch.no_grad():
        for call in calls:
            for tensor in tensors_in((call.args, call.kwargs)):
                if bad := count_bad(tensor.nan_to_num(nan=torch.nan, neginf=0.0)):  # additive masks hide with -inf
                    trace.note("input", None, "batch", detail=bad)
            module = call.module
            while isinstance(module, nn.parallel.DistributedDataParallel):
                module = module.module  # the wrapper's forward would wait for other ranks
            with traceless(model):
                call.random_state.restore()
                module(*call.args, **call.kwargs)
            if trace.found is not None:
                break
    return trace.found


def find_in_gradients(model: nn.Module, step: int) -> NonFinite | None:
    """Name where a non-finite gradient began: backward runs from the last module to the first and spoils all it passes on its way.

    Returns:
        The last parameter, in the model's order, whose gradient is not finite, if some later one is finite; a record without a
        layer where all are bad (then the loss was, or clipping has spread it); None where all are finite.
    """
    graded = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
    bad = [bool(count_bad(p.grad)) for _, p in graded if p.grad is not None]
    if not any(bad):
        return None
    if all(bad):
        return NonFinite(step, "gradient", None, None, "all gradients", f"{len(bad)} of {len(bad)} parameters")
    name, parameter = next(entry for entry, is_bad in zip(reversed(graded), reversed(bad), strict=True) if is_bad)
    layer, _, tensor = name.rpartition(".")
    detail = "" if parameter.grad is None else count_bad(parameter.grad)
    return NonFinite(
        step, "gradient", clean_name(layer), None, f"{tensor}.grad", f"{detail}; {sum(bad)} of {len(bad)} parameters"
    )


@contextmanager
def watch_modules(model: nn.Module, trace: _Trace) -> Iterator[None]:
    """Show a trace every module's inputs, parameters, outputs and attention calls; all hooks are taken out again."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            trace.names[module] = clean_name(name)
            before = module.register_forward_pre_hook(trace.enter, with_kwargs=True)
            after = module.register_forward_hook(_on_output(trace))
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(AttentionCapture(model, trace.attend, thorough=True))
        yield


def _on_output(trace: _Trace) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, _, output: trace.leave(module, output)


def count_bad(tensor: Tensor) -> str:
    """``"3 NaN, 1 inf of 64"``, or the empty string where every value is finite."""
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return ""
    nan = int(tensor.isnan().sum())
    infinite = int(tensor.isinf().sum())
    parts = [f"{count} {what}" for count, what in ((nan, "NaN"), (infinite, "inf")) if count]
    return f"{', '.join(parts)} of {tensor.numel()}"


def bad_heads(tensor: Tensor) -> list[int]:
    """Heads of ``[B, H, S, D]`` that hold a value that is not finite."""
    heads: list[int] = (~tensor.isfinite()).any(dim=-1).any(dim=-1).any(dim=0).nonzero().flatten().tolist()
    return heads


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and model outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
