"""One forward of an unmodified model, with a report of its attention calls."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.capture import AttentionCapture
from stabmon.records import AttentionCall

logger = logging.getLogger("stabmon")


def run_model(
    model: nn.Module,
    batch: Any,
    on_call: Callable[[AttentionCall], None],
    *,
    pattern: str | None = None,
    gradients: bool = False,
    attention_modules: tuple[str, ...] = (),
) -> Any:
    """Run one forward in evaluation mode and report each attention call as it happens.

    The model is left as it was: training flags, hooks and the global random state.

    Args:
        model: any model; compiled models run uncompiled.
        batch: the model's input, a mapping of keyword arguments, a tuple or list of positional
            ones, or one tensor.
        on_call: receives every attention call in the order of the forward. An exception in it is
            raised after the forward.
        pattern: regular expression that the layer's name must contain; None for all layers.
        gradients: keep the graph, for a backward.
        attention_modules: ``fnmatch`` patterns of modules whose hand-written softmax is attention,
            in case it is not found.

    Returns:
        The model's output.

    Raises:
        ValueError: if the batch is empty, no attention is found, or no layer matches the pattern.

    Example:
        >>> layers = []
        >>> model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> run_model(model, torch.randn(1, 5, 8), lambda call: layers.append(call.layer)).shape
        torch.Size([1, 5, 8])
        >>> layers
        ['self_attn']
    """
    wanted = compiled_pattern(pattern)
    errors: list[Exception] = []
    seen: list[str] = []
    reported = 0

    def report(call: AttentionCall) -> None:
        nonlocal reported
        seen.append(call.layer)
        if errors or (wanted is not None and not wanted.search(call.layer)):
            return
        reported += 1
        on_call(call)

    arguments, keywords = call_arguments(model, batch)
    capture = AttentionCapture(
        model,
        report,
        modules=attention_modules,
        on_error=errors.append,
        always_watch_functions=True,
    )
    with undisturbed(model), torch.enable_grad() if gradients else torch.no_grad(), capture:
        handle = model.register_forward_hook(lambda _, __, output: capture.witness.end(output))
        try:
            output = model(*arguments, **keywords)
        finally:
            handle.remove()
    if errors:
        raise errors[0]
    if not seen:
        raise ValueError(
            f"no attention was found in {type(model).__name__}; looked for {capture.looked_for()}"
        )
    if not reported:
        layers = ", ".join(dict.fromkeys(seen))
        raise ValueError(
            f"attention_layer_pattern {pattern!r} matches none of the layers: {layers}"
        )
    unseen = capture.witness.describe()
    if unseen is not None:
        logger.warning("%s", unseen)
    return output


def compiled_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compile a pattern of layer names; None stays None.

    Raises:
        ValueError: if it is not a valid regular expression.
    """
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"attention_layer_pattern {pattern!r} is not a valid regular expression: {error}"
        ) from None


def call_arguments(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments for a forward on ``batch``.

    A model that takes ``use_cache`` gets False, unless the batch sets it.

    Args:
        model: the model.
        batch: a mapping, a tuple or list, or one tensor.

    Raises:
        ValueError: if the batch is empty or of another kind.
    """
    arguments: tuple[Any, ...] = ()
    keywords: dict[str, Any] = {}
    if isinstance(batch, Tensor):
        arguments = (batch,)
    elif isinstance(batch, Mapping):
        keywords = dict(batch)
    elif isinstance(batch, tuple | list):
        arguments = tuple(batch)
    else:
        raise ValueError(
            f"batch is a {type(batch).__name__}: give a mapping of arguments, a tuple of them, or "
            "a tensor"
        )
    tensors = [each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor)]
    if not tensors or any(each.numel() == 0 for each in tensors):
        raise ValueError("the batch is empty: give at least one sample of at least one token")
    if takes(model, "use_cache"):
        keywords.setdefault("use_cache", False)
    return arguments, keywords


def takes(model: nn.Module, name: str) -> bool:
    """Return whether the model's forward, or its adapters' base's, has this parameter.

    Args:
        model: the model, possibly wrapped by PEFT.
        name: the parameter's name.
    """
    forwards = [model.forward]
    base = getattr(model, "get_base_model", None)
    if callable(base):
        forwards.append(base().forward)
    return any(name in inspect.signature(forward).parameters for forward in forwards)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, uncompiled; restore its state afterwards.

    Restored are the training flags and the global random state.
    """
    flags = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(
            torch.random.fork_rng(sorted(d.index for d in devices if d.index is not None))
        )
        # set_stance imports torch._dynamo, which takes seconds; a model can only be compiled if
        # that is loaded. Checked with torch 2.13; if compiled code came from another module, the
        # model would run compiled here.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            model.eval()
            yield
        finally:
            for module, training in flags:
                module.training = training


def mask_positions(mask: Tensor) -> Tensor:
    """Return the position ids of ``generate`` for an attention mask.

    Args:
        mask: ``[B, S]``, 0 at padding.

    Returns:
        ``[B, S]`` int64; 0 at padding on the left.

    Example:
        >>> mask_positions(torch.tensor([[0, 1, 1]])).tolist()
        [[0, 0, 1]]
    """
    return (mask.long().cumsum(1) - 1).clamp(min=0)
