"""Models of transformers, from a config alone or with their weights.

A model too large is reduced to one layer of each kind at full width.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabmon.model_names import (
    EXPERT_WIDTHS,
    FEED_FORWARD_WIDTHS,
    LAYER_COUNTS,
    OTHER_FEED_FORWARD_WIDTHS,
)

NARROW = {
    **dict.fromkeys((*FEED_FORWARD_WIDTHS, *OTHER_FEED_FORWARD_WIDTHS), 256),
    **dict.fromkeys(EXPERT_WIDTHS, 64),
    "vocab_size": 1024,
}
"""Upper limits of the sizes without a part in attention, for one-layer models."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def read_config(source: str) -> Any:
    """Read the config in a folder or a config.json, or of a name on the hub.

    Raises:
        ValueError: naming the fault in one line.
        ImportError: if transformers is not installed.
    """
    transformers = _transformers()
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # whatever a broken file leads transformers to
        reason = " ".join(str(error).split())[:160]
        local = Path(source).exists()
        mend = (
            "give a config.json with a model_type that transformers knows"
            if local
            else "give a local folder, a config.json or a hub name"
        )
        raise ValueError(
            f"{source}: not a model's config that can be read ({reason}); {mend}"
        ) from None


def model_class(config: Any) -> Any:
    """Return the model class of a config.

    The class named in the config, else the one with a loss for its type, else the bare model.
    """
    transformers = _transformers()
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for auto in (
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
        "AutoModelForSeq2SeqLM",
        "AutoModel",
    ):
        # _model_mapping: each config class with its model class, or a tuple of them. No public
        # name has it; checked with transformers 5.23. Without it only configs with
        # ``architectures`` could be checked.
        known = getattr(transformers, auto)._model_mapping
        if type(config) in known:
            found = known[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(
        f"{type(config).__name__}: transformers has no model of this type; give "
        "package.module:callable instead"
    )


def from_config(config: Any, attention: str | None, seed: int) -> nn.Module:
    """Make a model with the weights of its own initialisation.

    The model is in float32 and evaluation mode; the global generators are not touched.

    Args:
        config: a config of transformers.
        attention: the attention implementation; None for the model's own choice.
        seed: of the weights.

    Raises:
        ValueError: if the model cannot be made, or not with this attention.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            # _from_config: the constructor with a dtype and an attention implementation; the auto
            # classes' public from_config calls it, but does not take a class named in the config.
            # Checked with transformers 5.23.
            model: nn.Module = model_class(config)._from_config(
                copy.deepcopy(config), dtype=torch.float32, **options
            )
    except Exception as error:  # whatever values that cannot be lead transformers to
        raise ValueError(
            f"cannot make a {type(config).__name__[:-6]} of this config: "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    return model.eval()


def from_weights(source: str, config: Any, attention: str | None) -> nn.Module:
    """Load a model with its stored weights, in float32 and evaluation mode.

    Args:
        source: folder or hub name.
        config: its config.
        attention: the attention implementation; None for the model's own choice.

    Raises:
        ValueError: if the weights cannot be loaded.
    """
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        with quiet(), torch.random.fork_rng():
            model: nn.Module = model_class(config).from_pretrained(
                source, config=config, dtype=torch.float32, **options
            )
    except Exception as error:  # safetensors and pickle have errors of their own for a corrupt file
        raise ValueError(
            f"cannot load the weights of {source}: {' '.join(str(error).split())[:300]}"
        ) from None
    return model.eval()


def count_parameters(config: Any) -> int:
    """Count the parameters of a model without making them (meta device)."""
    with torch.device("meta"):
        model = from_config(config, None, 0)
    return sum(each.numel() for each in model.parameters())


def one_of_each_layer(config: Any) -> tuple[Any, int, int]:
    """Reduce a config to one layer of each kind at full width.

    All sizes without a part in attention are made small.

    Returns:
        The new config, its number of layers and that of the old one.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config() if hasattr(small, "get_text_config") else small
    kinds = list(getattr(text, "layer_types", None) or [])
    chosen = list(dict.fromkeys(kinds)) or [None]
    depth = max((getattr(text, name, 0) or 0 for name in LAYER_COUNTS), default=0)
    for part in {id(small): small, id(text): text}.values():
        for name in LAYER_COUNTS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(getattr(part, name), len(chosen)))
        if kinds and getattr(part, "layer_types", None):
            part.layer_types = chosen
        for name, most in NARROW.items():
            value = getattr(part, name, None)
            if isinstance(value, int) and value > most:
                setattr(part, name, most)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            value = getattr(part, name, None)
            if (isinstance(value, int) and value >= NARROW["vocab_size"]) or isinstance(
                value, list
            ):
                setattr(part, name, 0)
    return small, len(chosen), max(depth, len(chosen))


def has_weights(folder: str) -> bool:
    """Return whether a local folder holds weights for transformers to load."""
    return any(next(Path(folder).glob(pattern), None) is not None for pattern in WEIGHTS)


def available_memory() -> float:
    """Return the free memory of this machine in bytes; inf where unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024.0
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, AttributeError):
        return float("inf")


def tokenizer_of(source: str) -> Any:
    """Return the tokenizer beside a model, or None where none can be loaded."""
    try:
        with quiet():
            return _transformers().AutoTokenizer.from_pretrained(source)
    # whatever a tokenizer's files and dependencies come up with; bytes are read instead, and the
    # report says so
    except Exception:
        return None


def image_processor_of(source: str) -> Any:
    """Return the image processor beside a model, or None where none can be loaded."""
    try:
        with quiet():
            return _transformers().AutoImageProcessor.from_pretrained(source)
    except Exception:  # as above: images are resized and scaled instead, and the report says so
        return None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'transformers is not installed: pip install "stabmon[transformers]", '
            "or give module:callable"
        ) from error
    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and progress bars of transformers and its hub.

    Standard error is for one line of stabmon's. Does nothing where transformers is not imported.
    """
    if "transformers" not in sys.modules:
        yield
        return
    levels = {
        logger: logger.level
        for logger in map(logging.getLogger, ("transformers", "huggingface_hub"))
    }
    theirs: Any = _transformers().utils.logging

    bars = theirs.is_progress_bar_enabled()
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()
