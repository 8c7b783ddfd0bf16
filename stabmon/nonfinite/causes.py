"""Cause of a NaN or an inf, from its place and what is beside it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.number_formats import format_of
from stabmon._torch.tensors import local
from stabmon.model_names import LABELS, MASKS
from stabmon.nonfinite.bad_values import indices
from stabmon.operator import AttentionOperator
from stabmon.records import AttentionCall, Cause


def of_input(call: ForwardCall, name: str) -> Cause:
    """Return the cause of a bad input of the model, by the argument's name.

    Args:
        call: the forward.
        name: name of the argument, or ``argument 2`` where it was given by position.
    """
    name = _argument_name(call, name)
    return "labels" if LABELS.search(name) else "mask" if MASKS.search(name) else "data"


def of_values(tensor: Tensor, modules: Iterable[nn.Module] = ()) -> Cause:
    """Return the cause where a tensor was made of finite values.

    An inf is too large for its format, a NaN no number at all. In formats with float32's range
    nothing well trained comes near their end: there it is ``modules`` whose weights have blown up,
    if theirs have.

    Args:
        tensor: the bad tensor.
        modules: the modules that made it.
    """
    tensor = local(tensor.detach())
    if tensor.dtype == torch.float16:
        return "overflow"
    if not bool(tensor.isinf().any()):
        return "arithmetic"
    end = math.sqrt(torch.finfo(tensor.dtype).max)
    own = (each for module in modules for each in module.parameters(recurse=False))
    blown_up = any(float(local(each.detach()).abs().max()) > end for each in own if each.numel())
    return "weights" if blown_up else "overflow"


def unused_labels(call: ForwardCall) -> str:
    """Return a note on a forward's labels if none of them counts.

    Else the empty string. A label below 0 is ignored, as cross entropy does with -100; so is the
    first of each row where labels are shifted.
    """
    for name, tensor in call.inputs():
        whole = not (
            tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
        )
        name = _argument_name(call, name)
        if not whole or not tensor.numel() or not LABELS.search(name):
            continue
        counted = tensor[..., 1:] if tensor.dim() > 1 and tensor.shape[-1] > 1 else tensor
        if bool((counted < 0).all()):
            return f"all {counted.numel()} {name} are below 0, which ignores them"
    return ""


def _argument_name(call: ForwardCall, name: str) -> str:
    """Return the forward's name for an argument by position, as in ``argument 2``."""
    position = name.removeprefix("argument ")
    if position == name or not position.isdigit():
        return name
    try:
        names = list(inspect.signature(call.module.forward).parameters)
    except (TypeError, ValueError):  # a forward of C++ has no names
        return name
    return names[int(position)] if int(position) < len(names) else name


@dataclass(frozen=True)
class HiddenRows:
    """Query rows, of the layer that attended last, without a visible key."""

    layer: str = ""
    entries: tuple[int, ...] = ()
    """Batch entries that hold them."""
    batch: int = 0
    """Number of batch entries of the call."""
    rows: int = 0
    """Number of such rows."""

    @classmethod
    def of(cls, layer: str, operator: AttentionOperator) -> HiddenRows:
        """Return those of an attention call.

        Args:
            layer: the layer that attends.
            operator: its attention.
        """
        empty = ~operator.occupied.any(dim=1)  # hidden from every head: [B, Q]
        return cls(layer, tuple(indices(empty.any(dim=1))), len(empty), int(empty.sum()))

    def explain(self, tensor: Tensor) -> str:
        """Return a note on a later tensor if its NaN are in the same batch entries.

        Else the empty string.
        """
        if not self.entries or not bool(tensor.isnan().any()):
            return ""
        bad = tensor.detach().isnan()
        if tensor.dim() > 1 and self.batch in tensor.shape[:2]:
            at = 0 if tensor.shape[0] == self.batch else 1
            found = indices(bad.movedim(at, 0).flatten(1).any(dim=1))
            if not set(found) <= set(self.entries):
                return ""
        many = ", ".join(map(str, self.entries[:4])) + (", …" if len(self.entries) > 4 else "")
        return f"the mask hides every key from {self.rows} query rows (batch entries {many})"


@dataclass(frozen=True)
class BeyondExp:
    """Rows, of one attention call, whose hand-written exponentials leave their format."""

    layer: str
    head: int
    """The head that is farthest beyond."""
    detail: str

    @classmethod
    def of(cls, call: AttentionCall, operator: AttentionOperator) -> BeyondExp | None:
        """Return those of an attention call, None for none.

        Args:
            call: an attention call.
            operator: its attention.
        """
        if call.exp_range is None or call.exp_dtype is None:
            return None
        used = call.exp_range.masked_fill(~operator.occupied, 0)
        beyond = used >= 1
        if not bool(beyond.any()):
            return None
        head = int(used.nan_to_num(0.0, math.inf).amax(dim=(0, 2)).argmax())
        score = float(operator.max_score()[:, head].amax())
        name, end = format_of(call.exp_dtype), math.log(torch.finfo(call.exp_dtype).max)
        rows = f"{int(beyond.sum())} row{'s' if int(beyond.sum()) > 1 else ''}"
        return cls(
            call.layer.partition("#")[0],
            head,
            f"exp without the row's maximum subtracted leaves {name} in {rows}: it overflows at "
            f"{end:.1f}, the largest score is {score:.4g}",
        )


def of_weights(parameter: nn.Parameter, optimizers: Sequence[Any]) -> tuple[Cause, str]:
    """Return the cause of a bad parameter, and a note, from the optimizer's state.

    Args:
        parameter: the parameter that is not finite.
        optimizers: the torch optimizers.

    Returns:
        ``optimizer`` where its state shows that its step made it; else ``weights``.
    """
    group, state = _kept(parameter, optimizers)
    rate = group.get("lr")
    if rate is not None and not math.isfinite(float(rate)):
        return "optimizer", f"the learning rate is {float(rate)}"
    bad = ~local(parameter.detach()).isfinite()
    alike = {
        name: local(value)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }
    squares = next((value for name, value in alike.items() if "sq" in name), None)
    for name, value in alike.items():
        if value is not squares and not bool(value.isfinite().all()):
            why = f"the optimizer's {name} of it is not finite either, so that a gradient was not"
            return "weights", why
    if squares is not None and bool(squares.isinf().any()):
        why = "the square of a gradient is beyond what the optimizer's exp_avg_sq can hold"
        return "optimizer", why
    if squares is not None and group.get("eps") == 0 and bool((squares[bad] == 0).any()):
        return "optimizer", "eps is 0, and where every gradient was 0 the step is 0/0"
    return "weights", ""


def _kept(
    parameter: nn.Parameter, optimizers: Sequence[Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the group's settings and the state of a parameter."""
    for optimizer in optimizers:
        for group in getattr(optimizer, "param_groups", ()):
            if any(each is parameter for each in group["params"]):
                return group, optimizer.state.get(parameter, {})
    return {}, {}
