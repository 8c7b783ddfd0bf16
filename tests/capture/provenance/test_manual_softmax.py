"""Attention by exponentials and their sum is recorded as the softmax that it is, and its range."""

import math
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabmon.capture import AttentionCapture
from stabmon.records import AttentionCall
from tests.capture.provenance.test_provenance import (
    BIAS,
    HIDDEN,
    SCORES,
    Attends,
    K,
    Q,
    V,
    agree,
    calls_of,
    only,
)
from tests.support.attention_zoo import noise
from tests.support.probability_oracle import probabilities

SEEN = ~HIDDEN
TOP = math.log(torch.finfo(torch.float32).max)


def normalised(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True)


def written_lse(x: Tensor) -> Tensor:
    return torch.exp(x - torch.log(torch.exp(x).sum(-1, keepdim=True)))


def shifted_lse(x: Tensor) -> Tensor:
    top = x.amax(-1, keepdim=True)
    return torch.exp(x - (top + torch.log(torch.exp(x - top).sum(-1, keepdim=True))))


AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "multiplied": lambda x: normalised(x.exp() * SEEN),
    "multiplied by a float mask": lambda x: normalised(SEEN.float() * x.exp()),
    "multiplied in place": lambda x: normalised(x.exp().mul_(SEEN)),
    "filled": lambda x: normalised(x.exp().masked_fill(HIDDEN, 0.0)),
    "filled in place": lambda x: normalised(x.exp().masked_fill_(HIDDEN, 0.0)),
    "where": lambda x: normalised(torch.where(SEEN, x.exp(), 0.0)),
    "method where": lambda x: normalised(x.exp().where(SEEN, torch.zeros(()))),
    "tril": lambda x: normalised(x.exp().tril(16)),
}
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "and after": lambda x: normalised(x.masked_fill(HIDDEN, -1e4).exp() * SEEN),
    "by -inf": lambda x: normalised(x.masked_fill(HIDDEN, -torch.inf).exp()),
    "added": lambda x: normalised((x - 1e4 * HIDDEN).exp()),
    "inverse": lambda x: (lambda e: e.sum(-1)[..., None].reciprocal() * e)(
        x.masked_fill(HIDDEN, -1e4).exp()
    ),
    "clamped sum": lambda x: (lambda e: e / e.sum(-1, True).clamp(min=1e-9))(
        x.masked_fill(HIDDEN, -1e4).exp()
    ),
    "written logsumexp": lambda x: written_lse(x.masked_fill(HIDDEN, -1e4)),
    "base 2": lambda x: normalised((x * math.log2(math.e)).exp2() * SEEN),
}
SAFE: dict[str, Callable[[Tensor], Tensor]] = {
    "maximum": lambda x: normalised((x - x.max(-1, keepdim=True).values).exp() * SEEN),
    "maximum of the visible": lambda x: (lambda s: normalised((s - s.amax(-1, True)).exp()))(
        x.masked_fill(HIDDEN, -torch.inf)
    ),
    "shifted logsumexp": lambda x: shifted_lse(x.masked_fill(HIDDEN, -1e4)),
}
KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "logsumexp": lambda x: (lambda s: (s - s.logsumexp(-1, keepdim=True)).exp())(
        x.masked_fill(HIDDEN, -torch.inf)
    ),
    "logsumexp of a cast": lambda x: (
        lambda s: torch.exp(s - torch.logsumexp(s.double(), -1).float()[..., None])
    )(x + torch.zeros(6, 24).masked_fill(HIDDEN, -torch.inf)),
    "logsumexp in place": lambda x: (lambda s: s.sub_(s.logsumexp(-1, keepdim=True)).exp())(
        x.masked_fill(HIDDEN, -torch.inf)
    ),
    "softmax": lambda x: x.masked_fill(HIDDEN, -torch.inf).softmax(-1),
}
WAYS = AFTER | BEFORE | SAFE | KERNELS


def attend_by(way: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.dropout(way(q @ k.mT / 2), 0.1) @ v


@pytest.mark.parametrize("name", WAYS)
def test_masked_exponentials_over_their_sum_are_the_attention_they_are(name: str) -> None:
    with torch.no_grad():
        call = only(attend_by(WAYS[name]), Q, K, V)
    assert torch.equal(call.query, Q)
    agree(call, SCORES, HIDDEN)


def argument_of(name: str, scores: Tensor) -> Tensor:
    """Return what goes into exp."""
    if name in AFTER or name == "base 2":
        return scores
    if name == "maximum":
        return scores - scores.amax(-1, keepdim=True)
    masked = scores.masked_fill(HIDDEN, -1e4)
    return masked - masked.amax(-1, keepdim=True) if name in SAFE else masked


@pytest.mark.parametrize("name", WAYS)
def test_the_range_of_exp_that_is_used_is_that_of_its_own_arguments(name: str) -> None:
    with torch.no_grad():
        call = only(lambda q, k, v: WAYS[name](q @ k.mT * 5) @ v, Q, K, V)
    if name in KERNELS:
        assert call.exp_range is None
        assert call.exp_dtype is None
        return
    argument = argument_of(name, (Q @ K.mT * 5).double())
    total = argument.masked_fill(HIDDEN, -torch.inf).logsumexp(-1)
    shares = (
        argument.amax(-1) / TOP,
        (total - math.log(24)) / (TOP - math.log(24)),
        total / (-149 * math.log(2)),
        torch.zeros_like(total),
    )
    assert call.exp_dtype == torch.float32
    torch.testing.assert_close(
        call.exp_range.double(), torch.stack(shares).amax(0), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("cast", "ends"),
    [
        (lambda x: normalised(x.half().exp()), True),
        (lambda x: normalised(x.exp().half()), True),
        (lambda x: normalised(x.half().float().exp()), False),
        (lambda x: (lambda e: e / e.half().sum(-1, True).float())(x.exp()), True),
    ],
    ids=["of halves", "cast to halves", "of floats again", "summed in halves"],
)
def test_the_narrowest_format_between_exp_and_sum_sets_the_range(cast, ends: bool) -> None:
    factor = 12.5 / float(SCORES.max())  # beyond 11.09, far from 88.7
    call = only(lambda q, k, v: cast(q @ k.mT / 2 * factor).float() @ v, Q, K, V)
    assert (float(call.exp_range.max()) > 1) == ends
    assert float(call.exp_range.max()) == pytest.approx(12.5 / (11.09 if ends else 88.72), rel=0.25)


def test_a_sum_of_no_more_than_its_keys_uses_nothing_of_the_range() -> None:
    """In float16 the sum over 24 keys of exp(0) alone would be 29% of the way to overflow."""
    call = only(lambda q, k, v: normalised((0 * (q @ k.mT)).half().exp()).float() @ v, Q, K, V)
    assert float(call.exp_range.abs().max()) < 1e-3


def test_rows_whose_exponentials_all_vanish_use_the_whole_range() -> None:
    for shift, beyond in ((90.0, False), (120.0, True)):
        call = only(lambda q, k, v, s=shift: normalised((q @ k.mT / 20 - s).exp()) @ v, Q, K, V)
        assert bool((call.exp_range > 1).all()) == beyond


def test_factors_of_exponentials_are_a_bias() -> None:
    factors = BIAS.exp()
    call = only(lambda q, k, v: normalised((q @ k.mT / 2).exp() * factors) @ v, Q, K, V)
    assert torch.equal(call.query, Q)
    own = (SCORES + BIAS).double().softmax(-1)
    torch.testing.assert_close(probabilities(call), own, atol=1e-6, rtol=1e-5)


MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "keepdim": lambda e, v: (e @ v) / e.sum(-1, keepdim=True),
    "inverse": lambda e, v: 1 / e.sum(-1).unsqueeze(-1) * (e @ v),
    "einsum": lambda e, v: torch.einsum("bhij,bhjd->bhid", e, v) / (e.sum(-1, True) + 1e-9),
}


@pytest.mark.parametrize("how", MIXED)
def test_values_summed_before_the_division_are_attention_too(how: str) -> None:
    call = only(lambda q, k, v: MIXED[how]((q @ k.mT / 2).exp() * SEEN, v), Q, K, V)
    agree(call, SCORES, HIDDEN)
    assert call.exp_range is not None


class LookAlikes(nn.Module):
    """Exponentials, sums and logsumexps that are no attention, one a name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 4, 4))
        self.codes, self.features = nn.Parameter(torch.randn(7, 4)), torch.randn(4, 8)

    def router_by_exp(self, x: Tensor) -> Tensor:
        gate = normalised(self.router(x).exp())
        return torch.einsum("ble,blei->bli", gate, torch.einsum("bld,edi->blei", x, self.experts))

    def code_book(self, x: Tensor) -> Tensor:
        return normalised((x @ self.codes.mT).exp()) @ self.codes

    def contrast(self, x: Tensor) -> Tensor:
        similarity = x[:, 0] @ x[:, 1].mT
        shares = normalised(similarity.exp())
        return x - shares.diagonal().log().mean()

    def loss_by_logsumexp(self, x: Tensor) -> Tensor:
        similarity = x @ x.mT
        return x - (similarity - similarity.logsumexp(-1, keepdim=True)).diagonal(0, 1, 2).mean()

    def gate(self, x: Tensor) -> Tensor:
        e = torch.exp(x @ x.mT)
        return (e / (1 + e)) @ x

    def sums_to_one(self, x: Tensor) -> Tensor:
        s = (x @ x.mT).square()
        return (s / s.sum(-1, keepdim=True)) @ x

    def negative_factor(self, x: Tensor) -> Tensor:
        e = torch.exp(x @ x.mT) * torch.linspace(-1, 1, x.shape[1])
        return (e / e.sum(-1, keepdim=True)) @ x

    def other_sum(self, x: Tensor) -> Tensor:
        e, f = torch.exp(x @ x.mT), torch.exp(x @ x.flip(1).mT)
        return (e / f.sum(-1, keepdim=True)) @ x

    def floor_instead_of_mask(self, x: Tensor) -> Tensor:
        e = torch.exp(x @ x.mT).masked_fill(torch.eye(x.shape[1], dtype=torch.bool), 0.5)
        return (e / e.sum(-1, keepdim=True)) @ x

    def kernel_features(self, x: Tensor) -> Tensor:
        q, k = torch.exp(x @ self.features), torch.exp(x.flip(1) @ self.features)
        return (q @ (k.mT @ x)) / (q @ k.sum(1, keepdim=True).mT)

    def temperature(self, x: Tensor) -> Tensor:
        return x * torch.exp(-x.square().sum(-1, keepdim=True))

    def forward(self, name: str, x: Tensor) -> Tensor:
        return getattr(self, name)(x)


NAMES = [name for name in vars(LookAlikes) if not name.startswith("_") and name != "forward"]


@pytest.mark.parametrize("name", NAMES)
def test_what_only_looks_like_attention_by_hand_is_not_taken_for_it(name: str) -> None:
    model, calls, errors = LookAlikes(), [], []
    with AttentionCapture(model, calls.append, on_error=errors.append):
        model(name, noise(3, 6, 4))
    assert calls == []
    assert errors == []


def test_scores_overwritten_before_the_division_are_not_read() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 2
        e = scores.exp()
        scores.zero_()
        return normalised(e) @ v

    assert calls_of(attend, Q, K, V) == []


def test_scores_of_exponentials_are_held_no_longer_than_they_are_needed() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 2
        alive.append(weakref.ref(scores))
        e = scores.exp()
        del scores
        p = e / e.sum(-1, keepdim=True)
        out = p @ v
        assert alive[0]() is None
        return out + 0 * e.sum()

    with torch.no_grad():
        agree(only(attend, Q, K, V), SCORES)


@pytest.mark.parametrize(
    "name",
    [*(way for way in WAYS if "in place" not in way), *MIXED],  # backward needs what they lose
)
def test_gradients_are_the_same_to_the_bit_however_exponentials_are_followed(name: str) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if name in MIXED:
            return MIXED[name]((q @ k.mT / 2).exp(), v).square().sum()
        return attend_by(WAYS[name])(q, k, v).square().sum()

    found = []
    for watched in (True, False):
        torch.manual_seed(0)
        leaves = [each.clone().requires_grad_() for each in (Q, K, V)]
        seen: list[AttentionCall] = []
        if watched:
            model = Attends(loss)
            with AttentionCapture(model, seen.append):
                value = model(*leaves)
            assert len(seen) == 1
        else:
            value = loss(*leaves)
        found.append([value, torch.get_rng_state(), *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
