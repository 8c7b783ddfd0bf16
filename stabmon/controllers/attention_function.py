"""The attention function of a controlled module.

A controlled module keeps its class, its parameters and its config; only the name under which it
finds its attention function is another: see :class:`ControlledConfig`. The function of that name
changes queries and keys, and calls the model's own. Hooks keep the hidden states that the module
was called with for as long as the call lasts.

Private names of transformers, checked with transformers 5.23:
``config._attn_implementation`` holds the name of the attention function, and
``AttentionInterface._global_mapping`` is the class's table of functions by name, to which
``register`` adds and from which nothing public removes. If either changes, attaching still works
and the first forward of a controlled module fails.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabmon.capture.adapters.transformers_kernels import PARAMETERS, Kernel, Reader, biased, reader
from stabmon.capture.function_mode import isolated
from stabmon.capture.protocol import bind
from stabmon.controllers.cache import RememberingCache, is_cache
from stabmon.controllers.call import ControlledCall
from stabmon.controllers.features import changed_query, key_features, query_features
from stabmon.controllers.linear_reading import attend_linearly, log_weights
from stabmon.records import AttentionCall

CHILD = "stabmon_controller"
"""The name of a controller in its attention module, and so in the names of its parameters."""
PREFIX = "stabmon|"
"""``stabmon|sdpa`` is transformers' ``sdpa``, controlled."""


class ControlledConfig:
    """The config of a module while it is controlled, with another attention function.

    All other attributes are read from and written to the config itself.

    Args:
        config: the config.
        interface: transformers' ``AttentionInterface``, in which the name is looked up.
    """

    def __init__(self, config: Any, interface: type[Any]) -> None:
        object.__setattr__(self, "_stabmon_of", (config, interface))

    @property
    def _attn_implementation(self) -> str:
        config, interface = self.__dict__["_stabmon_of"]
        implementation = config._attn_implementation or "eager"
        name = PREFIX + implementation
        if name not in interface._global_mapping:
            interface.register(name, ControlledAttention(implementation))
        return name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["_stabmon_of"][0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_stabmon_of"][0], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return ControlledConfig, self.__dict__["_stabmon_of"]


def unregister(interface: type[Any]) -> None:
    """Take our names out of transformers' table.

    A module that is still controlled puts its own back when it is next called.
    """
    for name in [name for name in interface._global_mapping if name.startswith(PREFIX)]:
        del interface._global_mapping[name]


def globals_of_lookup(module: nn.Module) -> Mapping[str, Any] | None:
    """Return the globals of a forward that uses transformers' attention interface.

    None for a module that does not.
    """
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "get_interface" not in code.co_names or not hasattr(module, "config"):
        return None
    names: Mapping[str, Any] = forward.__globals__
    return names if "ALL_ATTENTION_FUNCTIONS" in names else None


def before(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a controlled module."""
    controller: Any = getattr(module, CHILD)
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    width = controller.site.width
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[-1] != width:
        found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(
            f"{controller.site.name} was called with {found}, not with hidden states [B, S, "
            f"{width}]: leave it out with layers=[...]"
        )
    call = controller.call = ControlledCall(controller, hidden)
    if call.new_bias is None:
        return args, kwargs
    remembering = [RememberingCache(each, call) if is_cache(each) else each for each in args]
    return tuple(remembering), {
        name: RememberingCache(each, call) if is_cache(each) else each
        for name, each in kwargs.items()
    }


def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of a controlled module, called also after an error.

    Hidden states that are kept would keep the whole graph.
    """
    getattr(module, CHILD).call = None


class ControlledAttention:
    """Attention function of transformers' interface for controlled modules.

    Args:
        implementation: the name of the attention function that runs in the end.
    """

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.__name__ = f"controlled_{implementation}_attention"

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend as every attention function does.

        Args:
            args: module, query ``[B, H, Q, D]``, key, value and mask.
            kwargs: all else.

        Returns:
            The output ``[B, Q, H, E]``, and the weights where the model's function gives them.

        Raises:
            ValueError: if the controller does not fit the attention it is put in.
        """
        given = bind(PARAMETERS, args, kwargs)
        module, controller = given["module"], getattr(given["module"], CHILD)
        if given["query"].shape[1] != controller.site.heads:
            raise ValueError(
                f"{controller.site.name} has {given['query'].shape[1]} heads, not "
                f"{controller.site.heads}: attach again"
            )
        # torch._C._current_graph_task_id: -1 outside of a backward. Checked with torch 2.13.
        # Without it a call recomputed by checkpointing would be measured twice.
        if controller.listener is not None and torch._C._current_graph_task_id() == -1:
            with isolated():
                self._notify(controller, given)
        share = controller.linear_share()
        if isinstance(share, float | int) and share == 1:
            return self._linear(controller, given), None
        output, weights = self._softmax(module, controller, given)
        if share is None:
            return output, weights
        share = share.to(output.dtype)[None, None, :, None] if isinstance(share, Tensor) else share
        return output + share * (self._linear(controller, given) - output), None

    def read_call(self, layer: str, given: Mapping[str, Any], dtype: torch.dtype) -> AttentionCall:
        """Return the modified attention of a call, without gradients, before it is made.

        A key bias appears as a mask that is added; attention that is in part linear as scores, the
        logarithms of its weights.

        Args:
            layer: name of the attention module.
            given: the arguments of the attention function, by name.
            dtype: of the model's own kernel.
        """
        controller = getattr(given["module"], CHILD)
        call = self._modified(controller, layer, given, dtype)
        share = controller.linear_share()
        if share is None:
            return call
        return AttentionCall(
            layer,
            None,
            None,
            scale=1.0,
            scores=log_weights(call, share),
            dtype=dtype,
            fused=call.fused,
            module=call.module,
        )

    def _notify(self, controller: Any, given: Mapping[str, Any]) -> None:
        """Pass the original and the modified attention of a call to the listener."""
        layer, dtype = controller.site.name, given["query"].dtype
        original = self._read(given["module"])(layer, given, dtype)
        controller.listener(controller, original, self.read_call(layer, given, dtype))

    def _functions(self, module: nn.Module) -> tuple[Kernel, Any]:
        """Return the attention function that runs in the end, and the module's eager one."""
        names = globals_of_lookup(module)
        assert names is not None
        code = inspect.unwrap(type(module).forward).__code__
        eager = next(
            (names[name] for name in code.co_names if name.startswith("eager") and name in names),
            None,
        )
        return names["ALL_ATTENTION_FUNCTIONS"].get_interface(self.implementation, eager), eager

    def _read(self, module: nn.Module) -> Reader:
        kernel, eager = self._functions(module)
        read = reader(kernel, eager)
        if read is None:
            raise ValueError(
                f"{self.implementation} attention of {type(module).__name__} cannot be read: use "
                "sdpa, eager, flex or flash"
            )
        return read

    def _modified(
        self, controller: Any, layer: str, given: Mapping[str, Any], dtype: torch.dtype
    ) -> AttentionCall:
        """Return a call after gain and bias.

        The bias is a mask that is added or, with a softcap, lies within it as features.
        """
        gain, query = controller.call.gain, given["query"]
        if gain is not None:
            query = query * gain[..., None].to(query.dtype)
        call = self._read(given["module"])(layer, {**given, "query": query}, dtype)
        bias = controller.call.bias(given["key"])
        if bias is None or call.query is None or call.key is None:
            return call
        bias = bias[..., : call.key.shape[2]]
        if call.softcap is None:
            bias = bias.to(torch.promote_types(bias.dtype, torch.float32))[:, :, None]
            return replace(call, mask=bias if call.mask is None else biased(call.mask, bias))
        key = torch.cat((call.key, key_features(bias, call.key.shape[1], call.key.dtype)), dim=-1)
        features = query_features(
            call.query, call.scale, key.shape[1], key.shape[-1] - call.key.shape[-1]
        )
        return replace(call, query=changed_query(call.query, None, features), key=key)

    def _softmax(
        self, module: nn.Module, controller: Any, given: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        kernel, _ = self._functions(module)
        query, plain, value = given["query"], given["key"], given["value"]
        scale = query.shape[-1] ** -0.5 if given.get("scaling") is None else given["scaling"]
        key = controller.call.with_features(plain)
        if key is None:
            query = changed_query(query, controller.call.gain, None)
            return run(kernel, {**given, "query": query, "scaling": scale})
        extra = key.shape[-1] - plain.shape[-1]
        query = changed_query(
            query, controller.call.gain, query_features(query, scale, key.shape[1], extra)
        )
        size = value.shape[-1]
        if self.implementation != "eager" and size == plain.shape[-1]:
            # fused kernels exist for values of as many features as keys have
            value = F.pad(value, (0, extra))
        output, weights = run(
            kernel, {**given, "query": query, "key": key, "value": value, "scaling": scale}
        )
        return output[..., :size], weights

    def _linear(self, controller: Any, given: dict[str, Any]) -> Tensor:
        """Return the output of linear attention, ``[B, Q, H, E]``."""
        query = given["query"]
        call = self._modified(controller, controller.site.name, given, query.dtype)
        return attend_linearly(call, given["value"]).transpose(1, 2).to(query.dtype)


def run(kernel: Kernel, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Call an attention function as models do: tensors by place, all else by name."""
    tensors = [given.get(name) for name in PARAMETERS[:5]]
    output: tuple[Tensor, Tensor | None] = kernel(
        *tensors, **{name: each for name, each in given.items() if name not in PARAMETERS[:5]}
    )
    return output
