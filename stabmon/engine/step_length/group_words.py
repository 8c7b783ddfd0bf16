"""Describe a parameter group by its name and the modules in it."""

from __future__ import annotations

import re

from torch import nn

from stabmon._torch.optimizer_adapter import ParameterGroup
from stabmon.capture.names import clean_name

MOST = 4
"""Modules that are named."""


def describe_group(model: nn.Module, group: ParameterGroup) -> str:
    """Return the name of a group, where it has one, and its modules, blocks as one.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> settings = {"params": list(model.parameters()), "name": "all"}
        >>> describe_group(model, ParameterGroup("0.0", None, settings))
        "'all' (*)"
    """
    own = {id(each) for each in group.parameters}
    names = [clean_name(name) for name, each in model.named_parameters() if id(each) in own]
    modules = dict.fromkeys(_of_all_blocks(name.rpartition(".")[0] or name) for name in names)
    words = ", ".join(list(modules)[:MOST])
    if len(modules) > MOST:
        words += f" and {len(modules) - MOST} more"
    name = group.settings.get("name")
    return " ".join(filter(None, [f"'{name}'" if name else "", f"({words})" if words else ""]))


def _of_all_blocks(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
