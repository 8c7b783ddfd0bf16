"""Adapter modules of PEFT, and the projections inside them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_adapter(module: nn.Module | None) -> bool:
    """Return True if a module is an adapter around another, as PEFT makes them."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def base_of(module: nn.Module) -> nn.Module:
    """Return the module inside all adapters; the module itself where there are none."""
    while is_adapter(module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def is_frozen(module: nn.Module) -> bool:
    """Return True if a projection's own weight is not trained, adapters aside."""
    weight = getattr(base_of(module), "weight", None)
    return isinstance(weight, Tensor) and not weight.requires_grad


def trained_in(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that an adapter trains."""
    return [
        each
        for name, each in module.named_parameters()
        if each.requires_grad and "base_layer" not in name.split(".")
    ]


def row_gain(module: nn.Module) -> nn.Parameter | None:
    """Return the trained vector that multiplies an adapter's features, bias included.

    None where it has none.
    """
    names = active_adapters(module)
    name = names[0] if len(names) == 1 else ""
    found: Any = ia3_gain(module, name)
    # DoRA adds the bias afterwards
    if found is None and getattr(base_of(module), "bias", None) is None:
        found = getattr(adapter_part(module, "lora_magnitude_vector", name), "weight", None)
    if not isinstance(found, nn.Parameter) or not found.requires_grad:
        return None
    return found if found.shape[0] == found.numel() else None


def ia3_gain(module: nn.Module, name: str) -> Any:
    """Return the vector by which IA3 multiplies the features of a projection; None without."""
    return None if getattr(module, "is_feedforward", False) else adapter_part(module, "ia3_l", name)


def is_transposed(module: nn.Module) -> bool:
    """Return True if a projection's weight is ``[in, out]``, as in transformers' Conv1D."""
    return type(module).__name__ == "Conv1D"


def active_adapters(module: nn.Module) -> list[str]:
    """Return the names of the adapters in use, without those merged into the base."""
    if (
        not is_adapter(module)
        or getattr(module, "disable_adapters", False)
        or getattr(module, "merged", False)
    ):
        return []
    return [str(name) for name in getattr(module, "active_adapters", ())]


def adapter_part(module: nn.Module, part: str, name: str) -> Any:
    """Return the entry of an adapter's ModuleDict; None where it has none.

    A ModuleDict has no ``get``.

    Args:
        module: the adapter module.
        part: attribute name of the ModuleDict.
        name: name of the adapter.
    """
    held: Any = getattr(module, part, {})
    return held[name] if name in held else None  # noqa: SIM401
