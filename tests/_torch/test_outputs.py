"""The loss is found in what a model returns, where it can be told from other numbers."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from stabmon import AttentionStabilityMonitor
from stabmon._torch.outputs import loss_in
from tests.support.small_runs import BATCH, LENGTH, Floats

LOGITS = torch.randn(2, 3, requires_grad=True) * 1.0
LOSS, OTHER = LOGITS.square().mean(), LOGITS.sum()
METRIC = LOGITS.detach().mean()


@dataclass
class Output:
    logits: Tensor
    lm_loss: Tensor


Named = namedtuple("Named", ["logits", "loss", "auxiliary"])


@pytest.mark.parametrize(
    "output",
    [
        LOSS,
        (LOSS, LOGITS),
        (LOGITS, LOSS),
        (LOGITS, LOSS, METRIC),
        (METRIC, LOGITS, LOSS),
        [LOGITS, LOSS],
        (LOGITS, {"accuracy": METRIC, "nll": LOSS}),
        {"logits": LOGITS, "lm_loss": LOSS},
        {"logits": LOGITS, "lm_loss": OTHER, "total_loss": LOSS},
        {"loss": LOSS, "aux_loss": OTHER, "temperature": METRIC},
        {"loss": METRIC, "objective": LOSS},
        {"logits": LOGITS, "nll": LOSS},
        Output(LOGITS, LOSS),
        Named(LOGITS, LOSS, OTHER),
        CausalLMOutput(loss=LOSS, logits=LOGITS),
        SimpleNamespace(loss=LOSS, aux=OTHER),
    ],
    ids=lambda each: type(each).__name__,
)
def test_the_loss_is_the_number_named_so_or_the_only_one_that_gradients_reach(output):
    assert loss_in(output) is LOSS


@pytest.mark.parametrize(
    "output",
    [
        None,
        LOGITS,
        (LOGITS, None),
        (LOSS, OTHER),
        (LOGITS, LOSS, OTHER),
        {"loss_boxes": LOSS, "loss_classes": OTHER},
        {"logits": LOGITS, "temperature": METRIC},
        {"logits": LOGITS.detach(), "temperature": METRIC},
        (LOGITS, METRIC),
        {"loss": torch.ones(2)},
        {"loss": torch.tensor(3)},
        "text",
    ],
    ids=lambda each: type(each).__name__,
)
def test_no_number_is_taken_for_the_loss_where_several_would_do_or_none_is_one(output):
    assert loss_in(output) is None


def test_without_gradients_names_and_single_numbers_still_tell():
    with torch.no_grad():
        assert loss_in((LOGITS.detach(), METRIC)) is METRIC
        assert loss_in({"logits": LOGITS.detach(), "total_loss": METRIC}) is METRIC


class Second(nn.Module):
    """Returns logits and loss, as nanoGPT does."""

    def __init__(self):
        super().__init__()
        self.inner = Floats()

    def forward(self, x, targets):
        logits = self.inner(x)
        return logits, nn.functional.cross_entropy(logits, targets)


def test_a_model_that_returns_its_loss_second_has_it_in_its_readings():
    model, x, targets = Second(), torch.randn(BATCH, LENGTH, 32), torch.arange(BATCH)
    with AttentionStabilityMonitor(model, None, log_every=1, sinks=[]) as monitor:
        _, loss = model(x, targets)
        loss.backward()
        assert monitor.on_step().readings[-1].loss == pytest.approx(loss.item())
