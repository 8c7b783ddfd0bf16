"""Controllers in a model's attention modules, attached and detached without trace."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from stabmon.capture.layout import head_count
from stabmon.capture.names import clean_name
from stabmon.controllers.attention_function import (
    CHILD,
    ControlledConfig,
    after,
    before,
    globals_of_lookup,
    unregister,
)
from stabmon.controllers.base import CONTROLLERS, Controller, Site
from stabmon.model_names import CROSS_PARTS

Layers = str | int | Sequence[str | int] | None


class Controllers(nn.ModuleDict):
    """The controllers of a model by module name, with ``/`` for the dots.

    They are submodules of their attention modules too.

    Args:
        model: the controlled model.
        members: its controllers, by the qualified name of their attention module.

    Attributes:
        controlled: a tuple of the model, which therefore is no submodule of this.

    Example:
        >>> from stabmon.controllers.linearization import Linearization
        >>> member = Linearization(Site("h.0.attn", 2, 8, 0, 1))
        >>> list(Controllers(nn.Identity(), {"h.0.attn": member}))
        ['h/0/attn']
    """

    def __init__(self, model: nn.Module, members: dict[str, Controller]) -> None:
        super().__init__({name.replace(".", "/"): member for name, member in members.items()})
        self.controlled = (model,)

    def by_layer(self) -> dict[str, Controller]:
        """Return the controllers by the qualified name of their attention module.

        Returns:
            Controller by name, in the order of the model's modules.

        Example:
            >>> from stabmon.controllers.linearization import Linearization
            >>> member = Linearization(Site("h.0.attn", 2, 8, 0, 1))
            >>> list(Controllers(nn.Identity(), {"h.0.attn": member}).by_layer())
            ['h.0.attn']
        """
        members: Any = self.items()
        return {name.replace("/", "."): member for name, member in members}


def attach_controllers(
    model: nn.Module, kind: str = "info_density", *, layers: Layers = None, **options: Any
) -> Controllers:
    """Put a controller into every self-attention module of a transformers model.

    Their parameters are the model's from then on, under ``<attention module>.stabmon_controller.``:
    give them to the optimizer, and wrap the model for distributed training after this. Weights,
    config and classes of the model stay as they are.

    Args:
        model: any model whose attention modules find their function in transformers' attention
            interface; wrapped or plain.
        kind: a name of ``stabmon list controllers``.
        layers: patterns of module names, or places counted from 0 (-1 is the last); None for all
            modules.
        options: arguments of the controller, such as ``form="key_bias"`` of ``info_density``.

    Returns:
        The controllers, an ``nn.ModuleDict``.

    Raises:
        ValueError: if the model has none such module, has controllers already, or a name or an
            option is wrong.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16))
        >>> list(attach_controllers(model, "info_density", form="key_bias"))
        ['h/0/attn', 'h/1/attn']
    """
    cls = CONTROLLERS[kind]
    if find_controllers(model):
        raise ValueError(
            "the model has controllers already: take them out with detach_controllers(model) first"
        )
    sites = chosen(find_sites(model), layers)
    members = {}
    for site, _ in sites:
        try:
            members[site.name] = cls(site, **options)
        except TypeError as error:
            raise ValueError(
                f"{kind}: {str(error).split('.')[-1].removeprefix('__init__() ')}"
            ) from error
    for site, module in sites:
        members[site.name].kind, members[site.name].options = kind, options
        put(module, members[site.name])
    return Controllers(model, members)


def detach_controllers(model: nn.Module) -> None:
    """Take all controllers out of a model and leave it as it was before them.

    A model without controllers stays as it is.

    Args:
        model: the controlled model.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16))
        >>> controllers = attach_controllers(model)
        >>> detach_controllers(model)
        >>> len(find_controllers(model))
        0
    """
    interfaces = set()
    for module in model.modules():
        member = controller_of(module)
        if member is not None:
            for handle in member.handles:
                handle.remove()
            config, interface = module.config.__dict__["_stabmon_of"]
            module.config = config
            interfaces.add(interface)
            delattr(module, CHILD)
    for interface in interfaces:
        unregister(interface)


def find_controllers(model: nn.Module) -> dict[str, Controller]:
    """Return the controllers in a model, by the qualified name of their module."""
    found = {clean_name(name): controller_of(module) for name, module in model.named_modules()}
    return {name: member for name, member in found.items() if member is not None}


def controller_of(module: nn.Module) -> Controller | None:
    """Return the controller that is a child of a module itself, not of one it wraps."""
    member = dict(module.named_children()).get(CHILD)
    return member if isinstance(member, Controller) else None


def find_sites(model: nn.Module) -> list[tuple[Site, nn.Module]]:
    """Return the modules that a controller can be attached to, in the model's order.

    Raises:
        ValueError: if there is none.
    """
    modules = [
        (clean_name(name) or type(module).__name__, module)
        for name, module in model.named_modules()
    ]
    found = [
        (name, module)
        for name, module in modules
        if globals_of_lookup(module) is not None and not is_cross(name, module)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no self-attention that finds its function in "
            "transformers' attention interface: controllers need a model of transformers 5, such "
            "as GPT-2, Llama, Qwen, Gemma, BERT or ViT"
        )
    sites = []
    for index, (name, module) in enumerate(found):
        config: Any = module.config
        heads = head_count(module) or getattr(config, "num_attention_heads", None)
        width = getattr(config, "hidden_size", None)
        if not isinstance(heads, int) or not isinstance(width, int):
            raise ValueError(
                f"{name}: its config lacks num_attention_heads or hidden_size: leave it "
                "out with layers=[...]"
            )
        sites.append((Site(name, heads, width, index, len(found)), module))
    return sites


def is_cross(name: str, module: nn.Module) -> bool:
    """Return True if a module attends over the keys of another sequence."""
    words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
    return bool(getattr(module, "is_cross_attention", False)) or any(
        word in words for word in CROSS_PARTS
    )


def chosen(sites: list[tuple[Site, nn.Module]], layers: Layers) -> list[tuple[Site, nn.Module]]:
    """Return the sites that ``layers`` selects.

    Raises:
        ValueError: for a pattern or a place that names none.
    """
    if layers is None:
        return sites
    wanted = [layers] if isinstance(layers, str | int) else list(layers)
    keep = set()
    for each in wanted:
        if isinstance(each, int):
            hits = {range(len(sites))[each]} if -len(sites) <= each < len(sites) else set()
        else:
            hits = {place for place, (site, _) in enumerate(sites) if fnmatchcase(site.name, each)}
        if not hits:
            raise ValueError(
                f"layers: {each!r} names none of {sites[0][0].name} ... {sites[-1][0].name} "
                f"({len(sites)} modules)"
            )
        keep |= hits
    return [sites[place] for place in sorted(keep)]


def put(module: nn.Module, member: Controller) -> None:
    """Attach a controller to its module."""
    names = globals_of_lookup(module)
    assert names is not None
    near = next(module.parameters(), None)
    if near is not None:
        member.to(near.device, torch.float64 if near.dtype == torch.float64 else torch.float32)
    member.train(module.training)
    config: Any = ControlledConfig(module.config, type(names["ALL_ATTENTION_FUNCTIONS"]))
    module.config = config
    setattr(module, CHILD, member)
    member.handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]
