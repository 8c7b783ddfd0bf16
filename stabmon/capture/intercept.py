"""Attention calls of an unmodified model, read, changed or replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from stabmon.capture.adapters.sdpa import PARAMETERS as SDPA_PARAMETERS
from stabmon.capture.adapters.sdpa import read_sdpa
from stabmon.capture.adapters.transformers import wrapped_lookup
from stabmon.capture.adapters.transformers_kernels import PARAMETERS, Kernel, Reader, reader
from stabmon.capture.callers import nearest_module
from stabmon.capture.function_mode import isolated, kernel_dtype
from stabmon.capture.names import ModuleNames
from stabmon.capture.protocol import bind
from stabmon.records import AttentionCall

STANDARD = {"attn_mask": "attention_mask", "dropout_p": "dropout", "scale": "scaling"}
"""Names of arguments in torch -> names in transformers."""
TORCH = {standard: name for name, standard in STANDARD.items()}


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """An attention call that is about to be made.

    B is batch, H query heads, H_kv key heads, Q queries, K keys, D and E features of a key and a
    value.
    """

    layer: str
    """Qualified name of the module that attends; ``name#1`` … from its second call in a forward
    on.
    """
    module: nn.Module
    kind: Literal["transformers", "sdpa"]
    """``transformers`` for its attention interface, ``sdpa`` for torch's
    ``scaled_dot_product_attention``.
    """
    arguments: Mapping[str, Any]
    """By transformers' names: query ``[B, H, Q, D]``, key, value ``[B, H_kv, K, E]``,
    attention_mask, scaling, is_causal …
    """
    kernel: Kernel
    reader: Reader

    def read(self, **changes: Any) -> AttentionCall:
        """Return the record of the call, made without gradients.

        Args:
            **changes: arguments to replace, by the names of ``arguments``.
        """
        given = {**self.arguments, **changes}
        with isolated():
            return self.reader(self.layer, given, kernel_dtype(given["query"]))

    def run(self, **changes: Any) -> Any:
        """Make the call, and return the kernel's result.

        Args:
            **changes: arguments to replace, by the names of ``arguments``.
        """
        given = {**self.arguments, **changes}
        if self.kind == "sdpa":
            return self.kernel(**{TORCH.get(name, name): value for name, value in given.items()})
        leading = [given.pop(name, None) for name in PARAMETERS[:5]]
        return self.kernel(*leading, **given)

    def output(self, result: Any) -> Tensor:
        """Return the attention output ``[B, H, Q, E]`` out of the kernel's result."""
        output: Tensor = result if self.kind == "sdpa" else result[0].transpose(1, 2)
        return output

    def result(self, output: Tensor) -> Any:
        """Return an attention output ``[B, H, Q, E]`` in the form of the kernel's result."""
        return output if self.kind == "sdpa" else (output.transpose(1, 2).contiguous(), None)


Around = Callable[[AttentionSite], Any]
"""Takes the place of one attention call, and returns its result: ``site.run()``, for example."""


@contextmanager
def intercepted(model: nn.Module, around: Around) -> Iterator[None]:
    """Replace every attention call of ``model`` in here by a call of ``around``.

    Seen are transformers' attention interface with its own kernels (eager, sdpa, flex, flash) and
    torch's ``scaled_dot_product_attention``, also inside ``nn.MultiheadAttention`` that returns no
    weights. Attention written by hand, and inside compiled code, is not seen. What ``around``
    raises reaches the caller of the model. Gradients flow as they would.

    Args:
        model: the model; its modules give the layers their names.
        around: see :data:`Around`.

    Example:
        >>> from torch import nn
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> shapes = []
        >>> def around(site):
        ...     shapes.append(tuple(site.arguments["query"].shape))
        ...     return site.run()
        >>> with intercepted(layer, around):
        ...     _ = layer(torch.randn(1, 5, 8))
        >>> shapes
        [(1, 2, 5, 4)]
    """
    names = ModuleNames(model)
    with ExitStack() as stack:
        inside = _Depth()
        stack.enter_context(_interface(names, around, inside))
        stack.enter_context(_Functions(names, around, inside))
        stack.callback(
            model.register_forward_pre_hook(lambda *_: names.new_forward(), prepend=True).remove
        )
        yield


class _Depth:
    """Count the intercepted calls around the present one."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


def _interface(names: ModuleNames, around: Around, inside: _Depth) -> AbstractContextManager[None]:
    """Hand calls through transformers' attention interface to ``around``."""

    def wrap(kernel: Kernel, plain: Kernel, default: Kernel) -> Kernel:
        read = reader(plain, default)
        if read is None:
            return kernel

        @functools.wraps(kernel)
        def attention(*args: Any, **kwargs: Any) -> Any:
            given = bind(PARAMETERS, args, kwargs)
            module, query = given.get("module"), given.get("query")
            if (
                inside.count
                or module not in names
                or not isinstance(query, Tensor)
                or query.ndim != 4
            ):
                return kernel(*args, **kwargs)
            assert isinstance(module, nn.Module)
            with inside.entered():
                return around(
                    AttentionSite(
                        names.next_layer(module), module, "transformers", given, kernel, read
                    )
                )

        return attention

    return wrapped_lookup(wrap)


class _Functions(TorchFunctionMode):
    """Function mode that hands calls of torch's fused attention to ``around``."""

    def __init__(self, names: ModuleNames, around: Around, inside: _Depth) -> None:
        super().__init__()
        self._names, self._around, self._inside = names, around, inside

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._inside.count and func is functional.scaled_dot_product_attention:
            return self._attend(nearest_module(self._names), func, args, kwargs)
        if not self._inside.count and func is functional.multi_head_attention_forward:
            return self._multihead(func, args, kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        module: nn.Module | None,
        kernel: Kernel,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        given = bind(SDPA_PARAMETERS, args, kwargs)
        if module is None or given["query"].is_nested:
            return kernel(*args, **kwargs)
        owner = module

        def read(layer: str, changed: Mapping[str, Any], dtype: torch.dtype) -> AttentionCall:
            return read_sdpa(
                layer,
                owner,
                {TORCH.get(name, name): value for name, value in changed.items()},
                dtype,
            )

        standard = {STANDARD.get(name, name): value for name, value in given.items()}
        with self._inside.entered():
            return self._around(
                AttentionSite(self._names.next_layer(owner), owner, "sdpa", standard, kernel, read)
            )

    def _multihead(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Replace the kernel inside ``F.multi_head_attention_forward`` while it runs.

        Function modes are off there (checked with torch 2.13).
        """
        module, kernel = nearest_module(self._names), functional.scaled_dot_product_attention

        def attend(*args: Any, **kwargs: Any) -> Any:
            return (
                kernel(*args, **kwargs)
                if self._inside.count
                else self._attend(module, kernel, args, kwargs)
            )

        functional.scaled_dot_product_attention = attend
        try:
            return func(*args, **kwargs)
        finally:
            functional.scaled_dot_product_attention = kernel
