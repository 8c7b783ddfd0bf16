"""Loss of a model on a batch while each query sees only some of its keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stabmon.analysis.call_facts import reads_other_sequence, token_ids
from stabmon.analysis.compression.key_choices import AllKeys, KeyChoice
from stabmon.analysis.compression.restricted_attention import restricted_attention
from stabmon.analysis.forward import call_arguments, run_model, undisturbed
from stabmon.analysis.patterns.layer_scan import is_causal_call
from stabmon.analysis.rollout.stacks import CallReader
from stabmon.capture.function_mode import isolated
from stabmon.capture.intercept import AttentionSite, intercepted
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall

LEAST_KEEP = 8
"""Smallest number of keys to try; no advice below twice as many visible keys."""
FAITHFUL = 1e-3
"""Largest difference in loss, in nats, between our attention and the model's own."""

LossFunction = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Cost:
    """Mean losses of the touched tokens, with and without a compression, in nats."""

    loss: float
    full: float
    error: float
    by_sample: list[float]
    n: int

    @property
    def rise(self) -> float:
        return self.loss - self.full


class NotMeasurable(Exception):
    """Reason against any measurement of this model and batch."""


class LossTrial:
    """A batch with a loss under any choice of keys.

    Args:
        model: a causal language model.
        batch: the input of its forward.
        loss_fn: (output, batch) -> losses in nats, or None for the next token's cross-entropy.
        seed: seed of random choices of keys.

    Raises:
        NotMeasurable: if the loss cannot be measured.
    """

    def __init__(
        self, model: nn.Module, batch: Any, loss_fn: LossFunction | None, seed: int
    ) -> None:
        self.model, self.batch, self.seed = model, batch, seed
        ids, decoder = token_ids(model, batch)
        if ids is None and loss_fn is None:
            raise NotMeasurable("the batch has no token ids, so there is no next-token loss")
        if decoder is not None:
            raise NotMeasurable("the model has an encoder and a decoder")
        self._ids, self._loss_fn = ids, loss_fn
        self._known: dict[tuple[str, int], Cost] = {}
        seen = self._visible_keys()
        self.context = max(int(n.max()) for n in seen.values())
        if self.context < 2 * LEAST_KEEP:
            raise NotMeasurable(f"no query sees more than {self.context} keys; give a longer text")
        self.left_out = [name for name, n in seen.items() if int(n.max()) < self.context]
        self.layers = len(seen)
        self._seen = max(seen.values(), key=lambda n: int(n.max()))
        plain = self._losses(None)
        self._full = self._losses(AllKeys())
        gap = float((self._full - plain).nanmean().abs())
        if not gap <= FAITHFUL:
            raise NotMeasurable(
                f"attention rebuilt with all keys changes the loss by {gap:.2g} nats"
            )

    def cost(self, name: str, keep: int, choice: KeyChoice) -> Cost:
        """Measure one choice, or return its stored result.

        Args:
            name: the choice's name, for the store.
            keep: number of keys kept.
            choice: the choice of keys.
        """
        if (name, keep) not in self._known:
            self._known[name, keep] = self._measure(keep, choice)
        return self._known[name, keep]

    def _measure(self, keep: int, choice: KeyChoice) -> Cost:
        losses, full = self._losses(choice), self._full
        touched = ~full.isnan()
        if losses.dim() == 2:
            touched &= (self._seen > keep)[:, : losses.shape[1]]
        rise = (losses - full).double()
        by_sample = [
            float(r[t].mean()) if bool(t.any()) else math.nan
            for r, t in zip(rise, touched, strict=True)
        ]
        n = int(touched.sum())
        if n == 0:
            return Cost(math.nan, math.nan, math.nan, by_sample, 0)
        error = float(rise[touched].std(unbiased=True) / n**0.5) if n > 1 else math.nan
        mean, mean_full = losses[touched].double().mean(), full[touched].double().mean()
        return Cost(float(mean), float(mean_full), error, by_sample, n)

    def _visible_keys(self) -> dict[str, Tensor]:
        """Return the number of keys visible to each query, by layer, ``[B, Q]``."""
        seen: dict[str, Tensor] = {}
        reader = CallReader(self.model)

        def count_keys(call: AttentionCall) -> None:
            attention = operator_of(call)
            if reads_other_sequence(call, reader):
                raise NotMeasurable(f"{call.layer} attends to another sequence")
            if not is_causal_call(attention) and attention.queries > 1:
                raise NotMeasurable(
                    f"the model is not causal: in {call.layer} queries see later keys"
                )
            count = torch.where(attention.is_counted, attention.n_visible(), 0).amax(1)
            seen[call.layer] = count.cpu()

        run_model(self.model, self.batch, count_keys)
        reached: set[str] = set()

        def note(site: AttentionSite) -> Any:
            reached.add(site.layer)
            return site.run()

        with self._running(note) as run:
            run()
        if missing := [name for name in seen if name not in reached]:
            raise NotMeasurable(
                f"{missing[0]} computes its attention by hand, and is not rewritten"
            )
        return seen

    @contextmanager
    def _running(self, around: Callable[[AttentionSite], Any]) -> Iterator[Callable[[], Any]]:
        arguments, keywords = call_arguments(self.model, self.batch)
        with undisturbed(self.model), torch.no_grad(), intercepted(self.model, around):
            yield lambda: self.model(*arguments, **keywords)

    def _losses(self, choice: KeyChoice | None) -> Tensor:
        """Return losses in nats on the CPU, ``[B, S - 1]``.

        ``[B]`` from some loss functions.
        """
        left_out = set(getattr(self, "left_out", ()))

        def around(site: AttentionSite) -> Any:
            if choice is None or site.layer in left_out:
                return site.run()
            value = site.arguments["value"]
            with isolated():
                attention = operator_of(site.read())
                output = restricted_attention(attention, value, choice)
            return site.result(output.to(value.dtype))

        with self._running(around) as run:
            output = run()
        return self._loss_of(output).detach().cpu()

    def _loss_of(self, output: Any) -> Tensor:
        if self._loss_fn is not None:
            losses = self._loss_fn(output, self.batch)
            if not isinstance(losses, Tensor) or losses.dim() not in (1, 2):
                raise ValueError("loss_fn must return a tensor of losses [B, S] or [B] in nats")
            return losses
        assert self._ids is not None
        logits = _logits(output)
        ids = self._ids.to(logits.device) if logits is not None else self._ids
        if logits is None or logits.shape[:2] != ids.shape or logits.shape[2] <= int(ids.max()):
            raise NotMeasurable(
                "the model gives no logits of the next token at every position; give it with its "
                "language-model head, or a loss_fn"
            )
        targets = ids[:, 1:].clone()
        keywords = self.batch if isinstance(self.batch, Mapping) else {}
        labels, mask = keywords.get("labels"), keywords.get("attention_mask")
        if isinstance(labels, Tensor) and labels.shape == ids.shape:
            targets = labels[:, 1:].to(ids.device)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            kept = mask.to(ids.device).bool()
            targets = targets.masked_fill(~(kept[:, 1:] & kept[:, :-1]), -100)
        losses = torch.stack(
            [
                functional.cross_entropy(one[:-1].float(), target, reduction="none")
                for one, target in zip(logits, targets, strict=True)
            ]
        )
        return losses.masked_fill(targets == -100, torch.nan)


def _logits(output: Any) -> Tensor | None:
    """Return the logits ``[B, S, V]`` in a language model's output, or None."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and not isinstance(output, Mapping):
        parts = output if isinstance(output, tuple | list) else (output,)
        found = next((x for x in parts if isinstance(x, Tensor) and x.dim() == 3), None)
    return found if isinstance(found, Tensor) and found.dim() == 3 else None
