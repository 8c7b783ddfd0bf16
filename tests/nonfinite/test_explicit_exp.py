"""A NaN of exponentials without the row's maximum is foretold, and attributed to the scores."""

import math

import pytest
import torch
from torch import Tensor, nn

import stabmon
from tests.support.small_runs import same_bits, weights

HEADS, WIDTH, LENGTH = 2, 16, 12


class ByHand(nn.Module):
    """Causal attention by exponentials over their sum."""

    def __init__(self, dtype: torch.dtype, shifted: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dtype, self.shifted, self.num_heads = dtype, shifted, HEADS

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (q @ k.mT / math.sqrt(WIDTH / HEADS)).masked_fill(~seen, -1e4).to(self.dtype)
        if self.shifted:
            scores = scores - scores.amax(-1, keepdim=True)
        e = torch.exp(scores) * seen
        p = nn.functional.dropout((e / e.sum(-1, keepdim=True)).float(), 0.1, self.training)
        return self.o((p @ v).transpose(1, 2).flatten(-2))


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, shifted: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(ByHand(dtype, shifted) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def train(model, steps, *, growth=1.0, at=0, monitor_of=None):
    """Train while W_q of the second block's head 1 grows from some step on; the monitor, if any."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    monitor = monitor_of(model, optimizer) if monitor_of else None
    torch.manual_seed(1)
    for step in range(steps):
        x, y = torch.randn(4, LENGTH, WIDTH), torch.randint(5, (4, LENGTH))
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= at:
            with torch.no_grad():
                model.blocks[1].q.weight[WIDTH // HEADS :] *= growth
        if monitor is not None:
            monitor.on_step(loss=loss)
        if not math.isfinite(loss.item()):
            return monitor, step + 1
    return monitor, None


def watch(model, optimizer):
    return stabmon.AttentionStabilityMonitor(
        model, optimizer, config="observe", log_every=2, sinks=[]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_growing_scores_are_alarmed_before_their_nan_which_is_named(dtype):
    monitor, onset = train(Model(dtype), 100, growth=1.15, at=10, monitor_of=watch)
    monitor.close()
    assert onset is not None
    assert not monitor.errors
    foretold = [i for i in monitor.issues if i.issue_type == "overflow_risk" and i.is_alarm]
    assert {(i.layer, i.head) for i in foretold} == {("blocks.1", 1)}
    assert foretold[0].step < onset
    assert foretold[0].evidence["exp_dtype"] == str(dtype).removeprefix("torch.")
    (bad,) = [i for i in monitor.issues if i.issue_type == "non_finite"]
    assert (bad.layer, bad.head, bad.evidence["kind"]) == ("blocks.1", 1, "score")
    assert bad.evidence["cause"] == "overflow"
    assert "exp without the row's maximum subtracted" in bad.evidence["detail"]


def test_the_same_scores_are_no_risk_where_the_maximum_is_subtracted():
    monitor, onset = train(Model(shifted=True), 40, growth=1.15, at=10, monitor_of=watch)
    monitor.close()
    assert onset is None
    assert [i for i in monitor.issues if i.issue_type in ("overflow_risk", "non_finite")] == []


def test_healthy_attention_by_hand_trains_to_the_bit_as_without_and_has_no_issue():
    ends = []
    for watched in (False, True):
        model = Model()
        monitor, _ = train(model, 30, monitor_of=watch if watched else None)
        ends.append(weights(model) | {"random": torch.get_rng_state().float()})
    monitor.close()
    assert same_bits(*ends)
    assert not monitor.errors
    assert monitor.issues == []
    assert not monitor.unseen


def test_a_nan_for_another_reason_is_not_put_on_exp():
    model = Model()

    def poisoned(model, optimizer):
        with torch.no_grad():
            model.blocks[0].v.weight[0, 0] = math.nan
        return watch(model, optimizer)

    monitor, _ = train(model, 3, monitor_of=poisoned)
    monitor.close()
    (bad,) = [i for i in monitor.issues if i.issue_type == "non_finite"]
    assert (bad.layer, bad.evidence["tensor"]) == ("blocks.0.v", "weight")


def test_a_sum_beyond_float16_is_told_though_its_row_is_finite():
    """Each exponential is below the end, 12 together are above it: forward is e / inf = 0."""
    model = Model(torch.float16)
    with torch.no_grad():
        for part in (model.blocks[1].q, model.blocks[1].k):
            part.weight.zero_()
            part.bias.fill_(math.sqrt(10.5 / math.sqrt(WIDTH / HEADS)))
    monitor, onset = train(model, 3, monitor_of=watch)
    monitor.close()
    assert onset is None
    worst = [i for i in monitor.issues if i.severity == "critical"]
    assert {(i.issue_type, i.layer, i.head) for i in worst} == {
        ("overflow_risk", "blocks.1", head) for head in range(HEADS)
    }
