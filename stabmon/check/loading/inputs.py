"""Inputs for a model: random tokens, a text, or noise. B batch, S tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.check.loading import pretrained
from stabmon.check.loading.source import LoadedModel
from stabmon.model_names import LAYER_COUNTS
from stabmon.tiny.corpus import read_text

BUDGET = 3e11
"""Floating-point operations of one forward and backward on the sample.

Some seconds of one core. Weights made for the check get a third of it, since their scores follow
from their spread at any length.
"""
LEAST = 64
DEFAULT_LENGTH = 512
"""Tokens to check for where neither the user nor the config names a length."""


def trained_length(target: LoadedModel, asked: int | None) -> int:
    """Return the length to train at, in tokens.

    Args:
        target: the model.
        asked: the length asked for; None for the config's own.

    Raises:
        ValueError: if the model has learned positions and fewer of them.
    """
    text = _text_config(target.config)
    most = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    length = asked or (most if isinstance(most, int) and most > 1 else DEFAULT_LENGTH)
    if isinstance(most, int) and length > most:
        learned = [
            each
            for name, each in target.model.named_modules()
            if isinstance(each, nn.Embedding) and ("pos" in name.lower() or name.endswith("wpe"))
        ]
        if any(each.num_embeddings <= most + 2 for each in learned):
            raise ValueError(
                f"--seq-len {length}: the model has {most} learned positions; give at most "
                f"{most}, or a config with more"
            )
    return length


def sample_length(target: LoadedModel, length: int, batch: int) -> int:
    """Return the longest sample for this machine to process in seconds.

    Args:
        target: the model.
        length: upper limit in tokens.
        batch: rows of the sample.

    Returns:
        ``length``, or a power of two below it.
    """
    made = sum(each.numel() for each in target.model.parameters())
    text = _text_config(target.config)
    width = getattr(text, "hidden_size", None) or getattr(text, "d_model", None) or 512
    layers = max((getattr(text, name, 0) or 0 for name in LAYER_COUNTS), default=0) or 12
    budget = BUDGET / 3 if target.analytic else BUDGET
    tokens = (
        length
        if _cost(length, batch, made, width, layers) <= budget
        else 1 << (length.bit_length() - 1)
    )
    while tokens > LEAST and _cost(tokens, batch, made, width, layers) > budget:
        tokens //= 2
    return min(tokens, length)


def _cost(tokens: int, batch: int, parameters: int, width: int, layers: int) -> float:
    return batch * tokens * (6.0 * parameters + 24.0 * layers * width * tokens)


def make_sample(
    target: LoadedModel, tokens: int, batch: int, text: str | None, seed: int
) -> tuple[dict[str, Any] | tuple[Any, ...], list[str]]:
    """Make the arguments of a model's forward.

    Args:
        target: the model.
        tokens: length of a row.
        batch: rows.
        text: a file to read; None for random tokens.
        seed: of the random tokens.

    Returns:
        The arguments, by keyword or by position, and notes for the report.

    Raises:
        ValueError: if the text is too short or cannot be read, or if no input can be made for the
            model.
    """
    if target.sample is not None:
        sample = target.sample
        return (sample if isinstance(sample, dict | tuple) else (sample,)), []
    generator = torch.Generator().manual_seed(seed)
    main = getattr(target.model, "main_input_name", None)
    config = target.config
    if config is not None and main == "pixel_values":
        return {"pixel_values": _image(config, batch, generator)}, []
    if config is not None and main == "input_features":
        frames = 2 * int(config.max_source_positions)
        features = torch.randn(batch, int(config.num_mel_bins), frames, generator=generator)
        length = min(tokens, int(config.max_target_positions))
        return {
            "input_features": features,
            "labels": _random(config.vocab_size, batch, length, generator),
        }, []
    if config is not None and main not in ("input_ids", None):
        raise ValueError(
            f"{type(target.model).__name__} reads {main}, which cannot be made up: use "
            "stabmon.check_attention_stability(model, sample)"
        )
    vocabulary = _vocabulary(target)
    if vocabulary is None:
        return _floats(target.model, tokens, batch, generator), []
    notes: list[str] = []
    ids = (
        _random(vocabulary, batch, tokens, generator)
        if text is None
        else _read(target, text, tokens, batch, vocabulary, notes)
    )
    taken = inspect.signature(target.model.forward).parameters
    if "input_ids" not in taken:
        return (ids,), notes
    found: dict[str, Any] = {"input_ids": ids}
    if "labels" in taken and _predicts_tokens(target.model):
        found["labels"] = ids
    if "use_cache" in taken:
        found["use_cache"] = False
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids
    return found, notes


def _predicts_tokens(model: nn.Module) -> bool:
    kinds = ("ForCausalLM", "LMHead", "ForMaskedLM", "ForConditionalGeneration")
    return any(kind in type(model).__name__ for kind in kinds)


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _vocabulary(target: LoadedModel) -> int | None:
    size = getattr(_text_config(target.config), "vocab_size", None)
    if isinstance(size, int):
        return size
    tables = [each for each in target.model.modules() if isinstance(each, nn.Embedding)]
    return tables[0].num_embeddings if tables else None


def _random(vocabulary: int, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, vocabulary, (batch, tokens), generator=generator)


def _image(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return torch.randn(
        batch, int(getattr(config, "num_channels", 3)), int(height), int(width), generator=generator
    )


def _floats(model: nn.Module, tokens: int, batch: int, generator: torch.Generator) -> tuple[Tensor]:
    width = next(
        (each.in_features for each in model.modules() if isinstance(each, nn.Linear)), None
    )
    width = width or next(
        (each.embed_dim for each in model.modules() if isinstance(each, nn.MultiheadAttention)),
        None,
    )
    if width is None:
        raise ValueError(
            f"{type(model).__name__}: no input can be made up for it; let the callable return "
            "(model, sample), or use "
            "stabmon.check_attention_stability(model, sample)"
        )
    return (torch.randn(batch, tokens, width, generator=generator),)


def _read(
    target: LoadedModel, text: str, tokens: int, batch: int, vocabulary: int, notes: list[str]
) -> Tensor:
    raw = read_text(text)[1]
    tokenizer = None if target.tokens_from is None else pretrained.tokenizer_of(target.tokens_from)
    if tokenizer is not None:
        ids = tokenizer(raw.decode(errors="replace"), return_tensors="pt", verbose=False)[
            "input_ids"
        ][0]
        unit = "tokens"
    else:
        ids = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() % vocabulary
        unit = "bytes"
        notes.append("no tokenizer was found beside the model: the text was read byte by byte")
    if len(ids) < tokens:
        raise ValueError(
            f"--text {text}: {len(ids)} {unit}, fewer than the {tokens} of a sample; give a "
            f"longer text or --seq-len {len(ids)}"
        )
    starts = torch.linspace(0, len(ids) - tokens, batch).round().long().tolist()
    return torch.stack([ids[at : at + tokens] for at in starts])
