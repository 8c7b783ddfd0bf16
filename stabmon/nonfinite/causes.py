"""Tell what made a NaN or an inf, from where it was found and what is beside it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.tensors import local
from stabmon.model_names import LABELS, MASKS
from stabmon.operator import AttentionOperator
from stabmon.records import Cause


def of_input(call: ForwardCall, name: str) -> Cause:
    """The cause where an input of the model is not finite, by the argument's name."""
    name = _in_signature(call, name)
    return "labels" if LABELS.search(name) else "mask" if MASKS.search(name) else "data"


def of_values(tensor: Tensor, modules: Iterable[nn.Module] = ()) -> Cause:
    """The cause where a tensor was made of finite values: an inf is too large for its format, a NaN
    no number at all.

    In formats with float32's range nothing well trained comes near their end: there it is
    ``modules`` whose weights have blown up, if theirs have.
    """
    tensor = local(tensor.detach())
    if tensor.dtype == torch.float16:
        return "overflow"
    if not bool(tensor.isinf().any()):
        return "arithmetic"
    end = math.sqrt(torch.finfo(tensor.dtype).max)
    own = [
        parameter
        for module in modules
        for parameter in module.parameters(recurse=False)
        if parameter.numel()
    ]
    blown_up = any(float(local(parameter.detach()).abs().max()) > end for parameter in own)
    return "weights" if blown_up else "overflow"


def unused_labels(call: ForwardCall) -> str:
    """What is to be said of a forward's labels where none of them counts; the empty string where
    some do, or there are none.

    A label below 0 is ignored, as cross entropy does with -100; so is the first of each row where
    labels are shifted.
    """
    for name, tensor in call.inputs():
        whole = (
            not tensor.is_floating_point()
            and not tensor.is_complex()
            and tensor.dtype != torch.bool
        )
        name = _in_signature(call, name)
        if not whole or not tensor.numel() or not LABELS.search(name):
            continue
        counted = tensor[..., 1:] if tensor.dim() > 1 and tensor.shape[-1] > 1 else tensor
        if bool((counted < 0).all()):
            return f"all {counted.numel()} {name} are below 0, which ignores them"
    return ""


def _in_signature(call: ForwardCall, name: str) -> str:
    """What the forward calls an argument that was given by its position, as in ``argument 2``."""
    position = name.removeprefix("argument ")
    if position == name or not position.isdigit():
        return name
    try:
        names = list(inspect.signature(call.module.forward).parameters)
    except (TypeError, ValueError):  # a forward of C++ tells no names
        return name
    return names[int(position)] if int(position) < len(names) else name


@dataclass(frozen=True)
class HiddenRows:
    """Query rows of the layer that attended last which see no key."""

    layer: str = ""
    entries: tuple[int, ...] = ()
    """The batch entries that hold them."""
    batch: int = 0
    rows: int = 0

    @classmethod
    def of(cls, layer: str, operator: AttentionOperator) -> HiddenRows:
        """Those of an attention call."""
        empty = ~operator.occupied.any(dim=1)  # hidden from every head: [B, Q]
        entries = empty.any(dim=1).nonzero().flatten().tolist()
        return cls(layer, tuple(entries), len(empty), int(empty.sum()))

    def explain(self, tensor: Tensor) -> str:
        """What is to be said of a tensor behind the layer, if its NaN are in the same batch
        entries; else the empty string.
        """
        if not self.entries or not bool(tensor.isnan().any()):
            return ""
        bad = tensor.detach().isnan()
        if tensor.dim() > 1 and self.batch in tensor.shape[:2]:
            at = 0 if tensor.shape[0] == self.batch else 1
            found = bad.movedim(at, 0).flatten(1).any(dim=1).nonzero().flatten().tolist()
            if not set(found) <= set(self.entries):
                return ""
        many = ", ".join(map(str, self.entries[:4])) + (", …" if len(self.entries) > 4 else "")
        return f"the mask hides every key from {self.rows} query rows (batch entries {many})"


def of_weights(parameter: nn.Parameter, optimizers: Sequence[Any]) -> tuple[Cause, str]:
    """Whether the optimizer made a parameter non-finite, by what it keeps of it: the cause, and
    what is to be said; ``weights`` where nothing speaks for the optimizer."""
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
            return (
                "weights",
                f"the optimizer's {name} of it is not finite either, so that a gradient was not",
            )
    if squares is not None and bool(squares.isinf().any()):
        return (
            "optimizer",
            "the square of a gradient is beyond what the optimizer's exp_avg_sq can hold",
        )
    if squares is not None and group.get("eps") == 0 and bool((squares[bad] == 0).any()):
        return "optimizer", "eps is 0, and where every gradient was 0 the step is 0/0"
    return "weights", ""


def _kept(
    parameter: nn.Parameter, optimizers: Sequence[Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The group's settings and the state of a parameter."""
    for optimizer in optimizers:
        for group in getattr(optimizer, "param_groups", ()):
            if any(each is parameter for each in group["params"]):
                return group, optimizer.state.get(parameter, {})
    return {}, {}
