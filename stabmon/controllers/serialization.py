"""Controllers on disk: ``controllers.safetensors`` and ``controllers.json``.

The first holds the parameters, the second everything else.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabmon._storage.atomic_write import replace_whole, write_text
from stabmon.capture.names import clean_name
from stabmon.controllers.attach import (
    Controllers,
    attach_controllers,
    detach_controllers,
    find_controllers,
    find_sites,
)
from stabmon.controllers.attention_function import CHILD
from stabmon.controllers.base import CONTROLLERS

SCHEMA_VERSION = 1
EDGE = 64
"""Values at either end of each base weight that make its fingerprint."""


def save_controllers(controlled: nn.Module, folder: str | Path) -> None:
    """Write the controllers of a model to a folder, and the base they fit.

    Args:
        controlled: the model, or the controllers that :func:`attach_controllers` returned; the
            model's own weights are not written.
        folder: created where it is missing; an earlier save in it is replaced.

    Raises:
        ValueError: if the model has no controllers.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16))
        >>> controllers = attach_controllers(model, "linear_ramp", learned=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_controllers(controllers, folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['controllers.json', 'controllers.safetensors']
    """
    from safetensors.torch import save_file

    model = controlled.controlled[0] if isinstance(controlled, Controllers) else controlled
    members = find_controllers(model)
    if not members:
        raise ValueError(
            "the model has no controllers: put some into it with attach_controllers(model, ...) "
            "first"
        )
    first = next(iter(members.values()))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{layer}.{name}": value.detach().cpu().contiguous()
        for layer, member in members.items()
        for name, value in member.state_dict().items()
    }
    about = {
        "schema_version": SCHEMA_VERSION,
        "controller": first.kind,
        "options": first.options,
        "layers": {
            layer: {"heads": member.site.heads, "width": member.site.width}
            for layer, member in members.items()
        },
        "base": {"model": base_class(model), "weights": fingerprint(model)},
    }
    about["save"] = uuid.uuid4().hex
    own = {"about": json.dumps(about)}
    replace_whole(
        folder / "controllers.safetensors", lambda fresh: save_file(tensors, fresh, metadata=own)
    )
    write_text(folder / "controllers.json", json.dumps(about, indent=2) + "\n")


def load_controllers(model: nn.Module, folder: str | Path, *, strict: bool = True) -> Controllers:
    """Attach the controllers that :func:`save_controllers` wrote to a folder.

    Controllers that the model has now are replaced.

    Args:
        model: a model of the same class, layers, heads and width.
        folder: the folder of the save.
        strict: refuse a base whose weights are not those that the controllers were saved with.
            False for a base that was trained on.

    Returns:
        The controllers, as from :func:`attach_controllers`.

    Raises:
        ValueError: naming the part that does not fit; the model is then as it was.
        OSError: if a file cannot be read.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2Model
        >>> model = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16))
        >>> controllers = attach_controllers(model, "linear_ramp", learned=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_controllers(controllers, folder)
        ...     list(load_controllers(model, folder))
        ['h/0/attn', 'h/1/attn']
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    about = _about(folder)
    tensors = load_file(folder / "controllers.safetensors")
    if about.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{folder}: schema_version {about.get('schema_version')!r}, but this stabmon reads "
            f"{SCHEMA_VERSION}: update it"
        )
    check_base(model, about, folder, strict)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted = expected_shapes(model, about)
    if shapes != wanted:
        odd = min(name for name, _ in set(shapes.items()) ^ set(wanted.items()))
        found, right = shapes.get(odd, "missing"), wanted.get(odd, "left out")
        raise ValueError(
            f"{folder}: {odd} is {found}, but should be {right}: the two files are not of one save"
        )
    detach_controllers(model)
    controllers = attach_controllers(
        model, about["controller"], layers=list(about["layers"]), **about["options"]
    )
    for layer, member in controllers.by_layer().items():
        member.load_state_dict({name: tensors[f"{layer}.{name}"] for name in member.state_dict()})
    return controllers


def _about(folder: Path) -> dict[str, Any]:
    """Return controllers.json, or the tensors file's own copy where the two differ.

    They differ after a save that was cut off between the two files.
    """
    from safetensors import safe_open

    with safe_open(folder / "controllers.safetensors", "pt") as file:
        own: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
    path = folder / "controllers.json"
    about: dict[str, Any] = json.loads(path.read_text()) if path.is_file() or not own else own
    return own if own and about.get("save") != own["save"] else about


def check_base(model: nn.Module, about: dict[str, Any], folder: Path, strict: bool) -> None:
    """Raise ValueError where a model is not the one that controllers were trained on.

    Args:
        model: the model to load into.
        about: the facts of the save.
        folder: the folder of the save, for messages.
        strict: compare the weights too.
    """
    base = about["base"]
    if base_class(model) != base["model"]:
        raise ValueError(
            f"{folder}: saved from a {base['model']}, but this is a {base_class(model)}: load "
            "them into the same model"
        )
    sites = {site.name: {"heads": site.heads, "width": site.width} for site, _ in find_sites(model)}
    for layer, shape in about["layers"].items():
        if sites.get(layer) != shape:
            raise ValueError(
                f"{folder}: {layer} was {shape} and is {sites.get(layer, 'missing')}: load them "
                "into the same model"
            )
    if strict and fingerprint(model) != base["weights"]:
        raise ValueError(
            f"{folder}: the base model's weights are not those it was saved with: load these "
            "first, or use strict=False"
        )


def expected_shapes(model: nn.Module, about: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that the controllers of a save must have."""
    cls = CONTROLLERS[about["controller"]]
    members = {
        site.name: cls(site, **about["options"])
        for site, _ in find_sites(model)
        if site.name in about["layers"]
    }
    return {
        f"{layer}.{name}": tuple(value.shape)
        for layer, member in members.items()
        for name, value in member.state_dict().items()
    }


def base_class(model: nn.Module) -> str:
    """Return the class name of the model inside all wrappers."""
    return [
        type(module).__name__ for name, module in model.named_modules() if not clean_name(name)
    ][-1]


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over all weights but the controllers'.

    It covers names, shapes and some values, and is the same in every dtype and on every device.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(
        (clean_name(name), each)
        for name, each in model.named_parameters()
        if f".{CHILD}." not in f".{name}"
    ):
        flat = parameter.detach().reshape(-1)
        ends = torch.cat((flat[:EDGE], flat[-EDGE:])).to("cpu", torch.float32)
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + ends.numpy().tobytes())
    return digest.hexdigest()
