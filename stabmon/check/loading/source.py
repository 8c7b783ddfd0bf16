"""The model behind MODEL on the command line.

A folder, a config.json, a hub name, or package.module:callable.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabmon.check.loading import pretrained

LARGE = 300_000_000
"""Least number of parameters for reducing a model without stored weights.

One layer of each kind is checked then: at random weights the layers are alike.
"""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model to check, and its origin."""

    model: nn.Module
    subject: str
    """Description of the model."""
    analytic: bool = False
    """True where the weights were made for the check."""
    config: Any = None
    """Config of transformers, where there is one."""
    whole: Any = None
    """Config of the whole model, where ``config`` is of one layer of each kind."""
    tokens_from: str | None = None
    """Folder or hub name of the tokenizer."""
    parameters: int = 0
    """Number of parameters of the whole model, made or not."""
    sample: Any = None
    """Input delivered with the model, if any."""
    make: Callable[[int], nn.Module] | None = None
    """Function from a seed to a fresh model, for models made by a callable."""
    notes: tuple[str, ...] = ()


def load_target(source: str, attention: str | None, seed: int) -> LoadedModel:
    """Load the model behind ``source``, in evaluation mode.

    Args:
        source: see the module.
        attention: attention implementation by transformers' name; None for the model's own choice.
        seed: of weights that have to be made.

    Raises:
        ValueError: in one line, naming the fault and the mend.
    """
    path = Path(source)
    if not path.exists() and ":" in source:
        return _from_callable(source, attention, seed)
    if not path.exists() and (
        source.endswith(".json") or source.startswith((".", "/", "~")) or source.count("/") > 1
    ):
        raise ValueError(
            f"{source}: no such file or folder; give a model's folder, its config.json, a hub "
            "name, or module:callable"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(
            f"{source}: holds no config.json; give a folder that save_pretrained wrote, or "
            "module:callable"
        )
    config = pretrained.read_config(source)
    count = pretrained.count_parameters(config)
    stored = not path.is_file() and (not path.is_dir() or pretrained.has_weights(source))
    room = pretrained.available_memory() / 2
    kind = pretrained.model_class(config).__name__
    tokens_from = str(path.parent) if path.is_file() else source
    if stored and count * 8 <= room:
        model = pretrained.from_weights(source, config, attention)
        return LoadedModel(
            model,
            f"{kind} of {source} with its weights ({count:,} parameters)",
            False,
            config,
            None,
            tokens_from,
            count,
        )
    notes = (
        (
            "the weights are too large for this machine's memory and were not read: this is the "
            "config alone",
        )
        if stored
        else ()
    )
    if count <= LARGE and count * 8 <= room:
        model = pretrained.from_config(config, attention, seed)
        subject = f"{kind} of {source} as its config initialises it ({count:,} parameters)"
        return LoadedModel(model, subject, True, config, None, tokens_from, count, notes=notes)
    small, made, layers = pretrained.one_of_each_layer(config)
    model = pretrained.from_config(small, attention, seed)
    subject = f"{kind} of {source} from its config alone ({count:,} parameters)"
    said = (
        f"{made} of {layers} layers made, one of each kind, full width, small vocabulary and "
        "feed-forward"
    )
    return LoadedModel(
        model, subject, True, small, config, tokens_from, count, notes=(*notes, said)
    )


def _from_callable(source: str, attention: str | None, seed: int) -> LoadedModel:
    module_name, _, name = source.partition(":")
    if attention is not None:
        raise ValueError(
            f"--attn does not apply to {source}, which chooses for itself: leave it out"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    make: Any
    with _one_line(
        source, "cannot be imported from here", "give package.module:callable that can be imported"
    ):
        make = importlib.import_module(module_name)
        for part in name.split("."):
            make = getattr(make, part)
    if not callable(make):
        raise ValueError(
            f"{source}: is a {type(make).__name__}; give a callable that makes the model"
        )

    def remake(seed: int) -> Any:
        mend = "give a callable that makes the model without arguments"
        with _one_line(source, "fails when it is called", mend), torch.random.fork_rng():
            torch.manual_seed(seed)
            return make()

    made = remake(seed)
    model, sample = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{source}: gives a {type(model).__name__}; it must give an nn.Module, or one and a "
            "sample of its input"
        )
    count = sum(each.numel() for each in model.parameters())
    config = getattr(model, "config", None) if hasattr(model, "main_input_name") else None

    def again(seed: int) -> nn.Module:
        found = remake(seed)
        new: nn.Module = found[0] if isinstance(found, tuple) else found
        return new

    return LoadedModel(
        model,
        f"{type(model).__name__} of {source} ({count:,} parameters)",
        False,
        config,
        None,
        None,
        count,
        sample,
        again,
    )


def error_words(error: BaseException) -> str:
    """Return an error's type and message on one line.

    >>> error_words(RuntimeError("out of\\nmemory"))
    'RuntimeError: out of memory'
    """
    try:
        reason = " ".join(str(error).split())[:200]
    except Exception:  # a message of others may fail in turn
        reason = ""
    return f"{type(error).__name__}{': ' if reason else ''}{reason}"


@contextmanager
def _one_line(source: str, what: str, mend: str) -> Iterator[None]:
    """Turn any error or exit of foreign code into a ValueError of one line.

    Its output goes to standard error.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code of others may raise anything, also GeneratorExit
        raise ValueError(f"{source}: {what} ({error_words(error)}); {mend}") from None
