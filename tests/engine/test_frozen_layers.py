"""Layers that do not train: a teacher inside the watched module, and frozen attention that learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stabmon
from tests.support.small_runs import batches, gpt2, optimizer_of

LAYERS = {"student.transformer.h.0.attn", "student.transformer.h.1.attn"}


class Distilled(nn.Module):
    """A student that learns the probabilities of a frozen teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = gpt2(), gpt2().requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(tokens).logits.softmax(-1)
        return F.cross_entropy(self.student(tokens).logits.flatten(0, 1), target.flatten(0, 1))


def watched(model: nn.Module, loss_of: Any) -> stabmon.AttentionStabilityMonitor:
    optimizer = optimizer_of(model, 1e-3)
    monitor = stabmon.AttentionStabilityMonitor(model, optimizer, sinks=[], log_every=1)
    with monitor:
        for tokens in batches(3):
            optimizer.zero_grad()
            loss = loss_of(tokens)
            loss.backward()
            optimizer.step()
            diagnosis = monitor.on_step(loss)
    assert not monitor.errors
    model.seen = set(diagnosis.stats)
    return monitor


def test_a_frozen_teacher_is_no_layer_in_training() -> None:
    model = Distilled()
    with torch.no_grad():  # a teacher whose attention is saturated is no alarm of this run
        for block in model.teacher.transformer.h:
            block.attn.c_attn.weight *= 60
    monitor = watched(model, model)
    assert model.seen == LAYERS
    assert {issue.layer for issue in monitor.issues} <= LAYERS | {None}


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_frozen_attention_behind_what_trains_is_a_layer(reentrant: bool | None) -> None:
    model = gpt2()
    model.transformer.h.requires_grad_(False)  # only embeddings, as soft prompts, train
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    watched(model, lambda tokens: model(tokens, labels=tokens).loss)
    assert model.seen == {name.removeprefix("student.") for name in LAYERS}
