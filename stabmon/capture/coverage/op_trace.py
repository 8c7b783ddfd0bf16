"""Operations of a forward, as the torch functions that Python calls.

They are searched by :mod:`stabmon.capture.coverage.op_graph`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from stabmon.capture.coverage.op_graph import Kind, Op
from stabmon.capture.provenance import multiply
from stabmon.capture.provenance.products import DIVIDES, TIMES

PRODUCTS = multiply.PRODUCTS | {
    *("inner", "mv", "vecdot", "cdist", "cosine_similarity", "linalg_vecdot"),
}
SOFTMAXES = {
    *("softmax", "log_softmax", "special_softmax", "special_log_softmax", "safe_softmax"),
    *("softmin", "gumbel_softmax"),
}
PARAMETRIC = {"embedding", "embedding_bag", "bilinear", "lstm", "gru", "rnn_tanh", "rnn_relu"}
NORMALISERS = DIVIDES | {"reciprocal", "logsumexp", "normalize", "rtruediv"}
FLAT = {"mm", "addmm", "linear", "mv"}
"""Products of which an unknown operand is taken for a weight: a sharded one is no ``nn.Parameter``
in the forward.
"""


def kind_of(name: str) -> Kind:
    """Return the kind of a torch function, by its name without underscores around it."""
    if name in SOFTMAXES:
        return "softmax"
    if name in ("exp", "exp2"):
        return "exponential"
    if name in PRODUCTS:
        return "product"
    if name in NORMALISERS:
        return "normaliser"
    if name in TIMES:
        return "mul"
    if name in ("sum", "nansum"):
        return "sum"
    if "attention" in name or "attn" in name or "transformer_encoder_layer" in name:
        return "fused"
    if name in PARAMETRIC or name.startswith("conv") or name.endswith("norm"):
        return "parametric"
    return "other"


class OpTrace:
    """Note each torch function of a forward, with the origins of its operands.

    None of its tensors is kept.

    Args:
        constants: the model's parameters and buffers.
        module_of: returns the module that calls a softmax or a fused kernel, None where it is none
            of the model's.
    """

    def __init__(
        self, constants: Iterable[Tensor], module_of: Callable[[], nn.Module | None]
    ) -> None:
        self.ops: list[Op] = []
        self._module_of = module_of
        self._origin: Any = WeakIdKeyDictionary()
        for tensor in constants:
            self._origin[tensor] = Op("parameter")

    def note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        *,
        span: tuple[int, int],
        seen: bool,
    ) -> None:
        """Note one call that has been made.

        Args:
            func: the torch function.
            args: its positional arguments.
            kwargs: its named arguments.
            result: its result.
            span: autograd's sequence numbers before and after it.
            seen: whether an adapter has recorded attention in it.
        """
        name = str(getattr(func, "__name__", "")).partition(".")[0].strip("_")
        made = [args[0]] if name == "setitem" else list(tensors_in(result))
        made = [
            tensor
            for tensor in made
            if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())
        ]
        if not made:
            return
        kind = kind_of(name)
        operands = [
            tensor
            for tensor in tensors_in((args, kwargs))
            if tensor.is_floating_point() or tensor.is_complex()
        ]
        inputs = tuple(
            self._of(tensor, "parameter" if name in FLAT else "tensor") for tensor in operands
        )
        if kind == "product" and name in ("linear", "baddbmm", "addmm", "addbmm"):
            inputs = inputs[:2] if name == "linear" else inputs[-2:]
        numel, ndim = max(each.numel() for each in made), max(each.ndim for each in made)
        op = Op(kind, name, inputs, numel, ndim, seen, span)
        if kind in ("softmax", "fused", "exponential"):
            op.module = self._module_of()
        self.ops.append(op)
        for tensor in made:
            self._origin[tensor] = op
            # Private, checked with torch 2.13: the tensor that a view is of. Without it scores
            # written into a buffer part by part are lost, and attention over it goes unnoticed.
            base = tensor._base
            # written in place into a view
            if base is not None and any(tensor is operand for operand in operands):
                self._origin[base] = Op(
                    "other", name, (self._of(base, "tensor"), op), base.numel(), base.ndim
                )
                self.ops.append(self._origin[base])

    def _of(self, tensor: Tensor, unknown: Kind) -> Op:
        op: Op | None = self._origin.get(tensor)
        if op is None:
            return Op(
                "parameter" if isinstance(tensor, nn.Parameter) else unknown,
                numel=tensor.numel(),
                ndim=tensor.ndim,
            )
        return op


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Yield every tensor in nested tuples, lists and mappings (a model's output)."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each, depth - 1)
    elif depth and isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each, depth - 1)


def sequence_number() -> int:
    """Return the number of autograd nodes that this thread has made so far."""
    # Private, checked with torch 2.13: each node takes the number as it is made. If it goes, nodes
    # cannot be assigned to calls, and everything recorded would be reported as missing.
    return torch._C._autograd._get_sequence_nr()
