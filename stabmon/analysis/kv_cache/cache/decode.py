"""Decoding with a compressed cache, and the log-probabilities of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.forward import mask_positions, takes, undisturbed
from stabmon.analysis.kv_cache.cache.compressed import CompressedCache


@torch.no_grad()
def decode(
    cache: CompressedCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    steps: int = 0,
    continuation: Tensor | None = None,
    chunk: int = 1,
) -> tuple[Tensor, Tensor]:
    """Feed a prompt, then decode greedily or follow a given continuation.

    No token ends the text: every sample gets all steps. The prompt is compressed once; with
        ``chunk``
    1 the cache evicts at each step as it does in ``generate``.

    Args:
        cache: a new cache.
        input_ids: ``[B, S]``.
        attention_mask: ``[B, S]``, 0 at padding on the left.
        steps: number of most likely tokens to decode.
        continuation: ``[B, T]`` tokens to follow instead.
        chunk: tokens of a continuation to feed at once.

    Returns:
        ``[B, T]`` tokens, and their log-probabilities in nats, float32; all but the last token are
        in the cache.
    """
    feed = Feed(cache.model, input_ids, attention_mask)
    tokens, scored = [], []
    with undisturbed(cache.model), cache.attached():
        last = feed(input_ids, cache.key_values, keep=1)
        if continuation is None:
            for step in range(steps):
                chosen = last[:, -1:].argmax(-1)
                tokens.append(chosen)
                scored.append(log_probability(last[:, -1:], chosen))
                last = feed(chosen, cache.key_values) if step < steps - 1 else last
        else:
            tokens.append(continuation)
            scored.append(follow(feed, cache.key_values, last, continuation, chunk))
    nothing = input_ids[:, :0]
    return (torch.cat(tokens, 1), torch.cat(scored, 1)) if tokens else (nothing, nothing.float())


def follow(feed: Feed, key_values: Any, last: Tensor, continuation: Tensor, chunk: int) -> Tensor:
    """Feed a continuation, some tokens at a time, and score each.

    Args:
        feed: the feed that has fed the prompt.
        key_values: the cache after the prompt.
        last: ``[B, 1 or more, V]`` logits; the last ones are those of the prompt's last token.
        continuation: ``[B, T]``.
        chunk: tokens to feed at once.

    Returns:
        ``[B, T]`` log-probabilities in nats, float32; the last token is scored and not fed.
    """
    scored = []
    for at in range(0, continuation.shape[1], chunk):
        part = continuation[:, at : at + chunk]
        fed = part[:, :-1] if at + chunk >= continuation.shape[1] else part
        last = torch.cat([last[:, -1:], feed(fed, key_values)], 1) if fed.shape[1] else last[:, -1:]
        scored.append(log_probability(last[:, : part.shape[1]], part))
    return torch.cat(scored, 1)


@torch.no_grad()
def full_log_probabilities(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, continuation: Tensor
) -> Tensor:
    """Compute the log-probability of each token of a continuation with a full cache.

    One ordinary forward over the whole text.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[B, S]`` prompt.
        attention_mask: ``[B, S]``, 0 at padding on the left, or None.
        continuation: ``[B, T]``.

    Returns:
        ``[B, T]`` in nats, float32.
    """
    new = continuation.shape[1]
    if not new:
        return continuation.float()
    whole = torch.cat([input_ids, continuation[:, :-1]], 1)
    with undisturbed(model):
        logits = Feed(model, input_ids, attention_mask)(whole, None, keep=new)
    return log_probability(logits[:, -new:], continuation)


def log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each token.

    Args:
        logits: ``[B, T, V]``.
        tokens: ``[B, T]``.

    Returns:
        ``[B, T]`` float32, in nats.

    Example:
        >>> log_probability(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
        tensor([[0.2500]])
    """
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


class Feed:
    """Feeder of a model's next tokens, with mask and positions of the whole sequence.

    Args:
        model: a causal language model of transformers.
        input_ids: ``[B, S]`` prompt.
        attention_mask: ``[B, S]``, 0 at padding on the left, or None.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        padded = attention_mask is not None and not bool(attention_mask.all())
        self.model, self.mask, self.seen = model, attention_mask if padded else None, 0
        self.prompt = input_ids.shape[1]
        self.takes_positions = takes(model, "position_ids")
        self.takes_keep = takes(model, "logits_to_keep")

    def __call__(self, ids: Tensor, key_values: Any, keep: int | None = None) -> Tensor:
        """Feed the next tokens and return their logits.

        Args:
            ids: ``[B, n]``.
            key_values: the cache, or None for a forward without one.
            keep: number of last logits to compute, in models that can; None for all.

        Returns:
            ``[B, n or keep, V]``.
        """
        given: dict[str, Any] = {"use_cache": key_values is not None}
        if key_values is not None:
            given["past_key_values"] = key_values
        self.seen += ids.shape[1]
        if self.mask is not None:
            mask = torch.nn.functional.pad(self.mask, (0, self.seen - self.prompt), value=1)
            given["attention_mask"] = mask
            if self.takes_positions:
                given["position_ids"] = mask_positions(mask)[:, -ids.shape[1] :]
        if keep is not None and self.takes_keep:
            given["logits_to_keep"] = keep
        logits: Tensor = self.model(input_ids=ids, **given).logits
        return logits
