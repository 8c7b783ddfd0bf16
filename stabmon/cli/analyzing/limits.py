"""Limits of a model's input: its vocabulary and its positions."""

from __future__ import annotations

from typing import Any

from torch import nn

from stabmon.check.loading.source import LoadedModel


def vocabulary_of(target: LoadedModel) -> int | None:
    """Return the number of token ids that the model knows, or None."""
    size = getattr(_text_config(target), "vocab_size", None)
    if isinstance(size, int):
        return size
    tables = [each for each in target.model.modules() if isinstance(each, nn.Embedding)]
    return tables[0].num_embeddings if tables else None


def most_positions(target: LoadedModel) -> tuple[int | None, bool]:
    """Return the number of positions, and True if they are learned.

    A model cannot take more tokens than learned positions; otherwise the number is the length that
    the model was made for, or None.
    """
    config = _text_config(target)
    stated = getattr(config, "max_position_embeddings", None) or getattr(
        config, "n_positions", None
    )
    stated = stated if isinstance(stated, int) and stated > 1 else None
    learned = []
    for name, each in target.model.named_modules():
        last = name.rpartition(".")[2].lower()
        if isinstance(each, nn.Embedding) and (
            "position" in last or last in ("wpe", "pos_emb", "pos_embed")
        ):
            # RoBERTa and OPT keep the first places for padding: positions start after padding_idx
            offset = each.padding_idx + 1 if each.padding_idx is not None else 0
            learned.append(each.num_embeddings - max(offset, int(getattr(each, "offset", 0))))
    relative = "bias" in " ".join(
        name for name, _ in target.model.named_modules() if "relative" in name
    )
    if learned and not relative:
        return min([*learned, *([stated] if stated else [])]), True
    return stated, False


def reads_tokens(target: LoadedModel) -> bool:
    """Return True if the model has a table of embeddings."""
    return any(isinstance(each, nn.Embedding) for each in target.model.modules())


def _text_config(target: LoadedModel) -> Any:
    """Return the model's config, of a multimodal model that of its text part."""
    config = target.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config
