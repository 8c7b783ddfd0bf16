"""Deletion check of an attribution: its top tokens against random ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.attribution.deletions import Delete, deletion_of
from stabmon.analysis.forward import call_arguments, undisturbed
from stabmon.analysis.rollout.objectives import logits_of, rows_of
from stabmon.analysis.rollout.positions import Positions, first_of
from stabmon.analysis.rollout.result import Rollout


@dataclass(frozen=True)
class DeletionEffect:
    """Drop of the model's own log-probability, in nats, after deleting k tokens.

    A drop is the log-probability with all tokens less that without k of them: positive if they
    mattered.

    Attributes:
        k: tokens deleted from each sample; a sample with fewer candidates loses all of these.
        top_drop: mean over samples, with the tokens of the largest attribution deleted.
        top_std: standard deviation over samples; NaN for one.
        random_drop: mean over draws and samples, with random tokens deleted.
        random_std: standard deviation over draws of the mean over samples.
        better_than_random: share of (sample, draw) pairs with the larger drop for the top tokens,
            ties half.
        samples, draws: their numbers.
    """

    k: int
    top_drop: float
    top_std: float
    random_drop: float
    random_std: float
    better_than_random: float
    samples: int
    draws: int


@dataclass(frozen=True)
class Faithfulness:
    """Effect of deletions of growing size.

    Attributes:
        way: method of deletion, in words.
        effects: one for each k.

    Example:
        >>> effect = DeletionEffect(1, 0.9, 0.1, 0.2, 0.05, 1.0, samples=4, draws=8)
        >>> Faithfulness("hidden from attention", (effect,)).to_values()["effects"][0]["top_drop"]
        0.9
    """

    way: str
    effects: tuple[DeletionEffect, ...]

    def to_values(self) -> dict[str, Any]:
        """Return plain values for a record: ``way``, and ``effects`` as mappings."""
        return {"way": self.way, "effects": [asdict(each) for each in self.effects]}


def deletion_check(
    model: nn.Module,
    batch: Any,
    attribution: Rollout | Tensor,
    *,
    k: int | Sequence[int] = (1, 4, 16),
    replacement: int | None = None,
    delete: Delete | None = None,
    targets: int | Sequence[int] | Tensor | None = None,
    draws: int = 8,
    seed: int = 0,
) -> Faithfulness:
    """Compare deleting the attribution's top k tokens with deleting k random ones.

    The model predicts with all tokens; then its log-probability of that same class or token is
    computed without some. Candidates are the tokens that are neither padding nor the target itself.

    Args:
        model: a model with logits ``[B, classes]`` or ``[B, N, tokens]``.
        batch: its input.
        attribution: a rollout of that batch; its last target's row counts, or without targets the
            last token's, or the first one's if attention is bidirectional and the output is one row
            per sample. Or scores ``[B, S]``.
        k: number of tokens to delete, or several numbers.
        replacement: a token id to put in their place. None hides them: text by the attention mask,
            image patches by their image's mean colour.
        delete: function ``(batch, positions [B, k]) -> batch`` for any other deletion.
        targets: position of the prediction, one for all or one per sample; None for the rollout's
            last target, or the last token. Unused if the output is one row per sample.
        draws: number of random choices.
        seed: seed of their own generator.

    Returns:
        For each k the drops in nats, with their spread.

    Raises:
        ValueError: if tokens of this input cannot be deleted, or a number is out of range.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from stabmon.analysis.rollout.api import attention_rollout
        >>> model = BertForSequenceClassification(BertConfig(
        ...     vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=8,
        ... ))
        >>> batch = {"input_ids": torch.arange(12).view(2, 6)}
        >>> found = deletion_check(model, batch, attention_rollout(model, batch), k=2, draws=3)
        >>> found.way, found.effects[0].samples, found.effects[0].draws
        ('hidden from attention', 2, 3)
    """
    sizes = [k] if isinstance(k, int) else list(k)
    if not sizes or min(sizes) < 1 or draws < 1:
        raise ValueError(f"k {k!r} and draws {draws!r}: give at least 1 of each")
    grid = attribution.image_grid if isinstance(attribution, Rollout) else None
    way = "given function"
    if delete is None:
        delete, way = deletion_of(model, batch, replacement, grid)
    logits = _logits(model, batch)
    scores, candidates, place = _scores(attribution, logits, targets)
    before = _log_p(logits, place)
    classes = before.argmax(-1, keepdim=True)
    start = before.gather(1, classes)[:, 0]

    def drop(places: Tensor) -> Tensor:
        after = _log_p(_logits(model, delete(batch, places)), place)
        return (start - after.gather(1, classes)[:, 0]).double().cpu()

    generator = torch.Generator().manual_seed(seed)
    effects = []
    for size in sizes:
        top = drop(_first(scores.cpu().double(), candidates.cpu(), size))
        noise = [
            torch.rand(scores.shape, generator=generator, dtype=torch.float64) for _ in range(draws)
        ]
        random = torch.stack([drop(_first(each, candidates.cpu(), size)) for each in noise])
        better = (top > random).double() + 0.5 * (top == random)
        effects.append(
            DeletionEffect(
                size,
                float(top.mean()),
                float(top.std()) if len(top) > 1 else float("nan"),
                float(random.mean()),
                float(random.mean(1).std()) if draws > 1 else float("nan"),
                float(better.mean()),
                len(top),
                draws,
            )
        )
    return Faithfulness(way, tuple(effects))


def _logits(model: nn.Module, batch: Any) -> Tensor:
    arguments, keywords = call_arguments(model, batch)
    with undisturbed(model), torch.no_grad():
        return logits_of(model(*arguments, **keywords))


def _log_p(logits: Tensor, place: Tensor) -> Tensor:
    """Return the log-probabilities at a position of each sample, ``[B, classes]``."""
    if logits.ndim == 3:
        logits = rows_of(logits, Positions(place[:, None], "target"), None)[:, 0]
    return logits.float().log_softmax(-1)


def _scores(
    attribution: Rollout | Tensor, logits: Tensor, targets: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores and candidates ``[B, S]``, and the predicting position ``[B]``."""
    if isinstance(attribution, Tensor):
        if attribution.ndim != 2 or len(attribution) != len(logits):
            raise ValueError(
                f"attribution of shape {list(attribution.shape)}: give [B, S] with B={len(logits)}"
            )
        valid = torch.ones(attribution.shape, dtype=torch.bool, device=attribution.device)
        place = _place(targets if targets is not None else -1, valid)
        return attribution, _without(valid, place), place
    if attribution.sources is not None:
        raise ValueError(
            "the rollout is of some sources only: give one of all tokens, or with targets"
        )
    valid, matrix = attribution.valid, attribution.matrix
    if attribution.targets is not None:
        row, scores = attribution.targets[:, -1], matrix[:, -1]
    else:
        last = valid.shape[1] - 1 - valid.flip(1).to(torch.uint8).argmax(1)
        is_causal = bool((matrix.triu(1) == 0).all())
        row = first_of(valid) if logits.ndim == 2 and not is_causal else last
        row = row if targets is None else _place(targets, valid)
        scores = matrix[torch.arange(len(matrix), device=matrix.device), row]
    place = row if targets is None else _place(targets, valid)
    candidates = attribution.source_valid
    if attribution.stack != "joined":
        candidates = _without(candidates, row)
    if attribution.image_grid is not None:  # special tokens have no pixels to delete
        special = torch.arange(attribution.image_grid["leading"], device=candidates.device)
        candidates = candidates.index_fill(1, special, False)
    return scores, candidates, place


def _place(targets: Any, valid: Tensor) -> Tensor:
    places = torch.as_tensor(targets)
    wanted = Positions(places.reshape(-1, 1) if places.ndim else targets, "target")
    wanted.check(len(valid))
    return torch.stack([wanted.of(index, row)[0] for index, row in enumerate(valid)])


def _without(valid: Tensor, place: Tensor) -> Tensor:
    return valid.scatter(1, place[:, None].to(valid.device), False)


def _first(scores: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Return positions ``[B, k]`` of the largest scores among the candidates.

    A sample with fewer candidates repeats its last.
    """
    ranked = (
        scores.masked_fill(~candidates, -torch.inf)
        .sort(dim=1, descending=True, stable=True)
        .indices[:, :k]
    )
    allowed = candidates.sum(1).clamp(min=1)
    index = torch.arange(ranked.shape[1]).expand_as(ranked).minimum(allowed[:, None] - 1)
    chosen: Tensor = ranked.gather(1, index)
    return chosen
