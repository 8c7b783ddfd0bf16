"""Many ways of scores to a softmax and of weights to a use, each recorded as the model computes."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabmon.capture import AttentionCapture
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall
from stabmon.signals.reduce import measure
from tests.support.attention_zoo import noise
from tests.support.probability_oracle import probabilities

H = 3
Q, K, V = noise(2, H, 6, 4, seed=1), noise(2, H, 24, 4, seed=2), noise(2, H, 24, 4, seed=3)
BIAS, HIDDEN = noise(H, 6, 24, seed=4), torch.ones(6, 24, dtype=torch.bool).triu(17)
SCORES = Q @ K.mT / 2


class Attends(nn.Module):
    """Module that runs a function that attends with a number of heads."""

    def __init__(self, function, heads: int | None = H) -> None:
        super().__init__()
        self.function = function
        if heads is not None:
            self.num_heads = heads

    def forward(self, *tensors: Tensor):
        return self.function(*tensors)


def calls_of(function, *tensors: Tensor, heads: int | None = H) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    errors: list[Exception] = []
    model = nn.ModuleDict({"a": Attends(function, heads)})
    with AttentionCapture(model, calls.append, on_error=errors.append):
        model["a"](*tensors)
    assert errors == []
    return calls


def only(function, *tensors: Tensor, heads: int | None = H) -> AttentionCall:
    (call,) = calls_of(function, *tensors, heads=heads)
    assert call.layer == "a"
    return call


def signals(call: AttentionCall) -> dict[str, list[float]]:
    return {
        name: sums.value.double().tolist()
        for name, sums in measure(operator_of(call), NAMES).items()
    }


NAMES = (
    "attention_entropy",
    "max_logit",
    "max_probability",
    "normalized_entropy",
    "precision_bits",
)


def expected(scores: Tensor, hidden: Tensor | None = None) -> dict[str, list[float]]:
    """Return the signals of scores ``[B, H, Q, K]``, from their definitions in float64."""
    z = scores.double()
    seen = torch.ones_like(z, dtype=torch.bool) if hidden is None else ~hidden.expand(z.shape)
    p = z.masked_fill(~seen, -torch.inf).softmax(-1)
    entropy, n = torch.special.entr(p).sum(-1), seen.sum(-1)
    many = n >= 16
    normal = (entropy / n.log().where(many, 1.0)).where(many, 0.0)
    bits = (
        z.abs().where(seen, 0).amax(-1) / (2 * torch.atanh(torch.tensor(0.1, dtype=torch.float64)))
    ).log2()
    return {
        "attention_entropy": entropy.mean((0, 2)).tolist(),
        "max_logit": z.masked_fill(~seen, -torch.inf).amax((0, 2, 3)).tolist(),
        "max_probability": p.amax(-1).mean((0, 2)).tolist(),
        "normalized_entropy": (normal.sum((0, 2)) / many.sum((0, 2))).tolist(),
        "precision_bits": bits.amax((0, 2)).tolist(),
    }


def agree(call: AttentionCall, scores: Tensor, hidden: Tensor | None = None) -> None:
    found, wanted = signals(call), expected(scores, hidden)
    for name in NAMES:
        assert found[name] == pytest.approx(wanted[name], abs=1e-5), name


def buffered(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.empty(2, H, 6, 24)
    for start in (0, 3):
        scores[..., start : start + 3, :] = q[..., start : start + 3, :] @ k.mT / 2
    return scores


def copied(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.full((2, H, 6, 24), -torch.inf)
    scores[..., :5].copy_(q @ k[..., :5, :].mT / 2)
    scores.narrow(-1, 5, 19).copy_(q @ k[..., 5:, :].mT / 2)
    return scores


def written_by_product(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.empty(2, H, 6, 24)
    for entry in range(2):
        torch.bmm(q[entry] / 2, k[entry].mT, out=scores[entry])
    return scores


def put(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.zeros(2, H, 6, 24)
    return scores.index_copy_(2, torch.arange(6), q @ k.mT / 2)


def decomposed(q: Tensor, k: Tensor) -> Tensor:
    scores = (q @ k.mT / 2).view(2, H, 2, 3, 2, 12)
    scores = scores + BIAS.view(H, 2, 3, 2, 12)[..., :1] + BIAS.view(H, 2, 3, 2, 12)[..., :1, :]
    return scores.view(2, H, 6, 24)


def stacked(q: Tensor, k: Tensor) -> Tensor:
    pairs = zip(q.flatten(0, 1), k.flatten(0, 1), strict=True)
    return (
        torch.stack([torch.tensordot(a, b, dims=([1], [1])) for a, b in pairs]).view(2, H, 6, 24)
        / 2
    )


WAYS = {
    "joined": lambda q, k: torch.cat([q @ k[..., :5, :].mT, q @ k[..., 5:, :].mT], -1) / 2,
    "joined both ways": lambda q, k: (
        torch.cat(
            [
                torch.cat([q[..., a, :] @ k[..., :5, :].mT, q[..., a, :] @ k[..., 5:, :].mT], dim=3)
                for a in (slice(2), slice(2, None))
            ],
            2,
        )
        / 2
    ),
    "stacked heads": lambda q, k: torch.stack([q[:, h] @ k[:, h].mT / 2 for h in range(H)], dim=1),
    "stacked batch": lambda q, k: torch.stack([q[b] @ k[b].mT / 2 for b in range(2)]),
    "stacked matrices": lambda q, k: stacked(q, k),
    "split keys": lambda q, k: (q @ k.mT / 2).unflatten(-1, (2, 12)).flatten(-2),
    "chunked and joined": lambda q, k: torch.cat(
        [part / 2 for part in (q @ k.mT).chunk(4, dim=-1)], dim=-1
    ),
    "split and stacked": lambda q, k: torch.stack((q @ k.mT / 2).unbind(2), 2),
    "sliced": lambda q, k: (q @ F.pad(k, (0, 0, 0, 3)).mT / 2)[..., :-3],
    "narrowed": lambda q, k: (F.pad(q, (0, 0, 2, 0)) @ k.mT / 2).narrow(2, 2, 6),
    "indexed": lambda q, k: (q @ k.flip(2).mT / 2).index_select(-1, torch.arange(24).flip(0)),
    "gathered": lambda q, k: (q @ k.mT / 2).gather(-1, torch.arange(24).expand(2, H, 6, 24)),
    "buffer by rows": buffered,
    "buffer by copies": copied,
    "out": written_by_product,
    "index_copy": put,
    "moved heads": lambda q, k: (q @ k.mT / 2).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "a product for each head of one tensor": lambda q, k: torch.cat(
        [(q[:, h] @ k[:, h].mT / 2)[:, None] for h in range(H)], 1
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_scores_are_followed_to_the_softmax(way: str) -> None:
    call = only(lambda q, k, v: WAYS[way](q, k).softmax(-1) @ v, Q, K, V)
    agree(call, SCORES)


def test_scores_whose_keys_were_split_for_a_bias_keep_query_and_key() -> None:
    call = only(lambda q, k, v: decomposed(q, k).softmax(-1) @ v, Q, K, V)
    assert torch.equal(call.query, Q)
    torch.testing.assert_close(
        probabilities(call), decomposed(Q, K).double().softmax(-1), atol=1e-6, rtol=1e-5
    )


def by_hand(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def in_place(x: Tensor) -> Tensor:
    x = x - x.amax(-1, keepdim=True)
    return x.exp_().div_(x.sum(-1, keepdim=True))


def inverse(x: Tensor) -> Tensor:
    e = x.exp()
    return e * (1 / (e.sum(-1)[..., None] + 1e-9))


def into_itself(x: Tensor) -> Tensor:
    return torch.softmax(x.detach(), -1, out=x.detach())


SOFTMAXES = {
    "torch": lambda x: torch.softmax(x, -1),
    "functional": lambda x: F.softmax(x, dim=3),
    "method": lambda x: x.softmax(dim=-1),
    "module": nn.Softmax(-1),
    "special": lambda x: torch.special.softmax(x, -1),
    "log and exp": lambda x: x.log_softmax(-1).exp(),
    "special log": lambda x: torch.special.log_softmax(x, dim=-1).exp(),
    "log module": lambda x: nn.LogSoftmax(-1)(x).exp(),
    "by hand": by_hand,
    "in place": in_place,
    "inverse": inverse,
    "no maximum": lambda x: (lambda e: e / e.sum(-1, True))(x.exp()),
    "logsumexp": lambda x: (x - x.logsumexp(-1, keepdim=True)).exp(),
    "normalised": lambda x: F.normalize(x.exp(), p=1, dim=-1),
    "into itself": into_itself,
}


@pytest.mark.parametrize("how", SOFTMAXES)
def test_a_softmax_is_one_however_it_is_made(how: str) -> None:
    with torch.no_grad():
        call = only(lambda q, k, v: F.dropout(SOFTMAXES[how](q @ k.mT / 2), 0.1) @ v, Q, K, V)
    assert torch.equal(call.query, Q)
    agree(call, SCORES)


PRODUCTS = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(2, 3)),
    "scaled query": lambda q, k: (q * 0.5) @ k.mT * 2,
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(2, H, 6, 24),
    "baddbmm": lambda q, k: torch.baddbmm(
        torch.empty(1, 6, 24), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0
    ).view(2, H, 6, 24),
    "spaces": lambda q, k: torch.einsum(" b h i d, b h j d -> b h i j ", q, k),
    "ellipsis": lambda q, k: torch.einsum("...id,...jd->...ij", q, k),
    "capitals": lambda q, k: torch.einsum("BHID,BHJD->BHIJ", q, k),
    "sublists": lambda q, k: torch.einsum(q, [0, 1, 2, 3], k, [0, 1, 4, 3], [0, 1, 2, 4]),
    "swapped": lambda q, k: torch.einsum("bhjd,bhid->bhij", k, q),
    "heads last": lambda q, k: torch.einsum("bhid,bhjd->bijh", q, k).permute(0, 3, 1, 2),
    "keys first": lambda q, k: torch.einsum("bhid,bhjd->jbhi", q, k).permute(1, 2, 3, 0),
    "multiplied and summed": lambda q, k: (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1),
    "multiplied and summed elsewhere": lambda q, k: (q.mT[..., :, None] * k.mT[..., None, :]).sum(
        dim=2
    ),
    "transposed": lambda q, k: (k @ q.mT).mT,
    "a factor a query": lambda q, k: (q / FACTORS) @ k.mT * FACTORS,
}


@pytest.mark.parametrize("how", PRODUCTS)
def test_a_product_is_one_however_it_is_made(how: str) -> None:
    call = only(lambda q, k, v: (PRODUCTS[how](q, k) / 2).softmax(-1) @ v, Q, K, V)
    assert call.query is not None
    agree(call, SCORES)


FACTORS = torch.linspace(1, 3, 6)[:, None]
SCALED = {
    "by zero": (lambda q, k: q @ k.mT * 0.0, 0 * SCORES),
    "over zero": (lambda q, k: ((q @ k.mT) / 0.0).nan_to_num(0.0, 1.0, -1.0), SCORES.sign()),
    "a key, heads last": (
        lambda q, k: (
            torch.einsum("bhid,bhjd->bihj", q, k).mT * FACTORS.new_tensor([[0.5]] * 24)
        ).permute(0, 3, 1, 2),
        SCORES,
    ),
    "a head, of heads folded": (
        lambda q, k: (
            (q.flatten(0, 1) @ k.flatten(0, 1).mT).view(2, H, 6, 24) * FACTORS[:H, :, None]
        ),
        SCORES * 2 * FACTORS[:H, :, None],
    ),
}


@pytest.mark.parametrize("how", SCALED)
def test_factors_that_no_query_can_take_are_in_the_scores(how: str) -> None:
    scores, wanted = SCALED[how]
    agree(only(lambda q, k, v: scores(q, k).softmax(-1) @ v, Q, K, V), wanted)


def written(p: Tensor) -> Tensor:
    buffer = torch.zeros(2, H, 6, 24)
    for head in range(H):
        buffer[:, head] = p[:, head]
    return buffer


USES = {
    "sum of products": lambda p, v: (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2),
    "einsum": lambda p, v: torch.einsum("bhij,bhjd->bihd", p, v),
    "transposed": lambda p, v: v.mT @ p.mT,
    "after dropout, mask and cast": lambda p, v: (
        (F.dropout(p.double(), 0.2) * (BIAS > -1)).float() @ v
    ),
    "mixed heads": lambda p, v: (
        F.linear(p.permute(0, 2, 3, 1), noise(H, H)).permute(0, 3, 1, 2) @ v
    ),
    "mixed by a convolution": lambda p, v: torch.einsum("bhij,hg->bgij", p, noise(H, H)) @ v,
    "one key": lambda p, v: p[..., :1] @ v[..., :1, :],
    "a slice at a time": lambda p, v: p[..., :5] @ v[..., :5, :] + p[..., 5:] @ v[..., 5:, :],
    "renormalised": lambda p, v: (
        (p / (p.sum(-1, keepdim=True) + 1e-6)).reshape(6, 6, 24).bmm(v.flatten(0, 1))
    ),
    "three operands": lambda p, v: torch.einsum("bhij,bhjd,hde->bie", p, v, noise(H, 4, 5)),
    "no output named": lambda p, v: torch.einsum("ij,jd", p[0, 0], v[0, 0]),
    "inner": lambda p, v: torch.inner(p, v[0, 0].mT),
    "heads joined": lambda p, v: torch.stack([p[:, h] for h in range(H)], 1) @ v,
    "copied": lambda p, v: torch.empty_like(p).copy_(p) @ v,
    "written": lambda p, v: written(p) @ v,
    "tensordot": lambda p, v: torch.tensordot(p[0, 0], v[0, 0], dims=1),
    "baddbmm": lambda p, v: torch.baddbmm(torch.zeros(6, 6, 4), p.flatten(0, 1), v.flatten(0, 1)),
}


@pytest.mark.parametrize("how", USES)
def test_weights_that_something_is_summed_with_are_attention(how: str) -> None:
    agree(only(lambda q, k, v: USES[how]((q @ k.mT / 2).softmax(-1), v), Q, K, V), SCORES)


def test_several_softmaxes_used_together_are_all_seen() -> None:
    ways = (
        lambda p, q, v: (p - 0.3 * q) @ v,
        lambda p, q, v: torch.cat([p, q], 2) @ v,
        lambda p, q, v: torch.stack([p, q]) @ v,
        lambda p, q, v: torch.where(HIDDEN, p, q) @ v,
    )
    for way in ways:
        calls = calls_of(
            lambda q, k, v, way=way: way((q @ k.mT / 2).softmax(-1), (q @ k.mT / 4).softmax(-1), v),
            Q,
            K,
            V,
        )
        assert [call.layer for call in calls] == ["a", "a#1"]
        agree(calls[0], SCORES)
        agree(calls[1], SCORES / 2)


DEAD = {
    "nothing": lambda p, v: v,
    "returned": lambda p, v: p,
    "entropy": lambda p, v: -(p * p.log()).sum(-1).mean() + v,
    "largest": lambda p, v: (
        v + p.max(-1).values.mean() + p.argmax(-1).sum() + p.topk(2).values.sum()
    ),
    "balanced": lambda p, v: v * (p.mean((0, 1, 2)) - 1 / 24).square().sum(),
    "sum over queries": lambda p, v: p.sum(2).std() * v,
}


@pytest.mark.parametrize("how", DEAD)
def test_weights_that_nothing_is_summed_with_are_no_layer_and_take_no_name(how: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        extra = DEAD[how]((q.transpose(1, 2) @ q.transpose(1, 2).mT).softmax(-1), torch.zeros(1))
        out = (q @ k.mT / 2).softmax(-1) @ v
        return out + extra.sum()

    agree(only(attend, Q, K, V), SCORES)


def test_a_softmax_over_the_queries_of_a_transposed_product_is_the_transposed_attention() -> None:
    call = only(lambda q, k, v: (k @ q.mT / 2).softmax(-2).mT @ v, Q, K, V)
    assert torch.equal(call.query, Q)
    agree(call, SCORES)
    call = only(
        lambda q, k, v: torch.einsum("bhji,bhjd->bhid", (k @ q.mT / 2 + BIAS.mT).softmax(dim=2), v),
        Q,
        K,
        V,
    )
    torch.testing.assert_close(
        probabilities(call), (SCORES + BIAS).double().softmax(-1), atol=1e-6, rtol=1e-5
    )
    assert calls_of(lambda q, k, v: (q @ k.mT).softmax(-2) @ v, Q, K, V) == []


MASKS = {
    "multiplied": lambda x, c: x * (~HIDDEN).float() + c * HIDDEN.float(),
    "subtracted": lambda x, c: x * (~HIDDEN) - (1 - (~HIDDEN).float()) * -c,
    "added": lambda x, c: x + torch.zeros(6, 24).masked_fill(HIDDEN, c),
    "filled": lambda x, c: x.masked_fill(HIDDEN, c),
    "where": lambda x, c: torch.where(HIDDEN, c, x),
    "where of a tensor": lambda x, c: torch.where(~HIDDEN, x, torch.full_like(x, c)),
    "method where": lambda x, c: x.where(~HIDDEN, torch.tensor(c)),
    "in place": lambda x, c: x.masked_fill_(HIDDEN, c),
    "set": lambda x, c: x.__setitem__((..., HIDDEN), c) or x,
    "joined": lambda x, c: torch.cat(
        [x[..., :4].masked_fill(HIDDEN[:, :4], c), x[..., 4:].masked_fill(HIDDEN[:, 4:], c)], -1
    ),
    "split": lambda x, c: (x.view(2, H, 6, 2, 12) + c * HIDDEN.view(6, 2, 12)).view(2, H, 6, 24),
    "after an unknown step": lambda x, c: x.sinh().asinh() + c * HIDDEN,
    "with a bias": lambda x, c: x + (1e-6 * BIAS).masked_fill(HIDDEN, c),
}


@pytest.mark.parametrize("value", [-1e9, -1e4, -2e3, -100.0])
@pytest.mark.parametrize("how", MASKS)
def test_a_hidden_key_counts_nowhere_whatever_it_holds(how: str, value: float) -> None:
    call = only(lambda q, k, v: MASKS[how](q @ k.mT / 2, value).softmax(-1) @ v, Q, K, V)
    agree(call, SCORES, HIDDEN)


@pytest.mark.parametrize("value", [-1e9, -1e4, -100.0])
@pytest.mark.parametrize("bias", [0.0, 1e-6])
def test_a_hidden_key_of_a_fused_call_counts_nowhere_whatever_it_holds(
    value: float, bias: float
) -> None:
    mask = (bias * BIAS).masked_fill(HIDDEN, value)
    call = only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), Q, K, V)
    agree(call, SCORES, HIDDEN)
    assert (call.mask.dtype == torch.bool) == (bias == 0)


def test_a_fused_call_s_mask_that_scores_can_reach_or_that_falls_with_distance_hides_nothing() -> (
    None
):
    for scale, mask in (
        (40, -100.0 * HIDDEN),
        (1, -9.0 * HIDDEN),
        (1, -4.0 * torch.arange(24.0).expand(6, 24)),
    ):
        call = only(
            lambda q, k, v, mask=mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
            Q * scale,
            K,
            V,
        )
        assert torch.equal(call.mask.float().reshape(6, 24), mask)


def test_keys_padded_to_a_block_are_hidden_and_keys_padded_with_zeros_are_seen() -> None:
    for value in (-torch.inf, -1e4, -100.0):
        call = only(
            lambda q, k, v, value=value: (
                F.pad(q @ k.mT / 2, (0, 2), value=value).softmax(-1)[..., :24] @ v
            ),
            Q,
            K,
            V,
        )
        agree(
            call,
            F.pad(SCORES, (0, 2)),
            F.pad(torch.zeros(6, 24, dtype=torch.bool), (0, 2), value=True),
        )
    call = only(
        lambda q, k, v: F.pad(q @ k.mT / 2, (0, 2)).softmax(-1) @ F.pad(v, (0, 0, 0, 2)), Q, K, V
    )
    agree(call, F.pad(SCORES, (0, 2)))


def test_a_buffer_s_keys_that_were_never_written_are_hidden() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.full((2, H, 6, 24), -1e4)
        scores[..., 2:21] = q @ k[..., 2:21, :].mT / 2
        return scores.softmax(-1) @ v

    hidden = torch.ones(6, 24, dtype=torch.bool)
    hidden[:, 2:21] = False
    agree(only(attend, Q, K, V), SCORES, hidden)


def test_a_bias_that_falls_with_distance_hides_nothing() -> None:
    bias = -4.0 * torch.arange(24.0).expand(6, 24)
    for scores in (
        lambda q, k: q @ k.mT / 2 + bias,
        lambda q, k: (q @ k.mT / 2).sinh().asinh() + bias,
    ):
        call = only(lambda q, k, v, scores=scores: scores(q, k).softmax(-1) @ v, Q * 0.01, K, V)
        seen = operator_of(call).n_visible()
        assert bool((seen == 24).all())
        torch.testing.assert_close(
            probabilities(call), (SCORES * 0.01 + bias).double().softmax(-1), atol=1e-6, rtol=1e-5
        )


def test_a_mask_that_scores_can_reach_hides_nothing() -> None:
    call = only(lambda q, k, v: (q @ k.mT / 2 - 3.0 * HIDDEN).softmax(-1) @ v, Q, K, V)
    assert bool((operator_of(call).n_visible() == 24).all())
    torch.testing.assert_close(
        probabilities(call), (SCORES - 3.0 * HIDDEN).double().softmax(-1), atol=1e-6, rtol=1e-5
    )


SINKS = {
    "learned": (lambda q: torch.arange(3.0).view(H, 1, 1).expand(2, H, 6, 1), (H,)),
    "of the query": (lambda q: q @ noise(H, 4, 1), (2, H, 6)),
}


@pytest.mark.parametrize("how", SINKS)
@pytest.mark.parametrize("first", [True, False])
def test_a_sink_holds_probability_and_is_no_key(how: str, first: bool) -> None:
    column, shape = SINKS[how]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [column(q), q @ k.mT / 2]
        scores = torch.cat(parts if first else parts[::-1], dim=-1)
        p = (scores - scores.max(-1, keepdim=True).values).softmax(-1)
        return (p[..., 1:] if first else p[..., :-1]) @ v

    call = only(attend, Q, K, V)
    assert call.sinks.shape == shape
    assert torch.equal(call.query, Q)
    own = torch.cat([SCORES, column(Q)], -1).double().softmax(-1)
    torch.testing.assert_close(probabilities(call), own[..., :-1], atol=1e-6, rtol=1e-5)
    found = signals(call)
    assert found["attention_entropy"] == pytest.approx(
        torch.special.entr(own).sum(-1).mean((0, 2)).tolist(), abs=1e-5
    )
    assert found["max_logit"] == pytest.approx(SCORES.double().amax((0, 2, 3)).tolist(), abs=1e-5)
    assert found["max_probability"] == pytest.approx(
        own[..., :-1].amax(-1).mean((0, 2)).tolist(), abs=1e-5
    )


def test_softmax_off_by_one_has_a_sink_at_zero() -> None:
    call = only(lambda q, k, v: F.pad(q @ k.mT / 2, (1, 0)).softmax(-1)[..., 1:] @ v, Q, K, V)
    assert torch.equal(call.sinks, torch.zeros(H))
    torch.testing.assert_close(
        probabilities(call),
        F.pad(SCORES, (1, 0)).double().softmax(-1)[..., 1:],
        atol=1e-6,
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: (lambda a: (a / a.sum(-1, keepdim=True)) @ v)((q @ k.mT).softmax(-2)),
        lambda q, k, v: (q @ k.mT).sigmoid() @ v,
        lambda q, k, v: (q @ k.mT) @ v,
        lambda q, k, v: (lambda e: (e / (1 + e.sum(-1, keepdim=True))) @ v)((q @ k.mT).exp()),
        lambda q, k, v: (q.unsqueeze(-2) * k.unsqueeze(-3))[:, :, 0].sum(-1).softmax(-1),
        lambda q, k, v: torch.vmap(lambda a, b, c: (a @ b.mT).softmax(-1) @ c)(q, k, v),
    ],
    ids=[
        "slots",
        "sigmoid",
        "linear",
        "one more in the sum",
        "one row of those multiplied out",
        "vmap",
    ],
)
def test_a_softmax_over_no_keys_or_of_unknown_origin_is_not_shown(function) -> None:
    assert calls_of(function, Q, K, V) == []


def test_a_joined_column_that_has_a_value_is_a_key() -> None:
    null = noise(2, H, 1, 4)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([q @ null.mT / 2, q @ k.mT / 2], -1).softmax(-1) @ torch.cat([null, v], 2)

    agree(only(attend, Q, K, V), torch.cat([Q @ null.mT / 2, SCORES], -1))


def test_scores_changed_after_the_softmax_are_recorded_as_they_were() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 2
        p = scores.softmax(-1)
        scores.zero_()
        return p @ v

    with torch.no_grad():
        agree(only(attend, Q, K, V), SCORES)


WINDOWS = {
    "heads before windows": ((2, H, 4, 6, 8), lambda q: q.permute(0, 2, 1, 3, 4)),
    "as many windows as heads": ((2, H, H, 6, 8), lambda q: q.permute(0, 2, 1, 3, 4)),
    "windows before heads": ((2, 4, H, 6, 8), lambda q: q),
}


@pytest.mark.parametrize("heads", [H, None])
@pytest.mark.parametrize("how", WINDOWS)
def test_heads_are_found_beside_windows(how: str, heads: int | None) -> None:
    """Project to ``[B, windows, L, H * D]``: heads lie beside the head dimension in memory."""
    windows = H if how.startswith("as many") else 4
    q, k = (
        noise(2, windows, n, H * 4, seed=n).view(2, windows, n, H, 4).transpose(2, 3)
        for n in (6, 24)
    )
    swap = not how.startswith("windows")

    def attend(q: Tensor, k: Tensor) -> Tensor:
        q, k = (t.transpose(1, 2) if swap else t for t in (q, k))
        return (q @ k.mT / 2).softmax(-1) @ k

    def fused(q: Tensor, k: Tensor) -> Tensor:
        q, k = (t.transpose(1, 2) if swap else t for t in (q, k))
        return F.scaled_dot_product_attention(q, k, k, scale=0.5)

    for function in (attend, fused):
        agree(only(function, q, k, heads=heads), (q @ k.mT / 2).flatten(0, 1))


def test_products_as_features_of_another_product_do_not_hide_it() -> None:
    def attend(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = torch.einsum("bhid,hde->bhie", x, noise(H, 4, 4))
        return (q @ k.mT).softmax(-1) @ v

    call = only(attend, Q, K, V)
    own = (torch.einsum("bhid,hde->bhie", Q, noise(H, 4, 4)) @ K.mT).double().softmax(-1)
    torch.testing.assert_close(probabilities(call), own, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "way", [*WAYS, *(how for how in SOFTMAXES if how not in ("in place", "into itself"))]
)
def test_gradients_are_the_same_to_the_bit_however_scores_are_followed(way: str) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = WAYS[way](q, k).softmax(-1) if way in WAYS else SOFTMAXES[way](q @ k.mT / 2)
        return (F.dropout(p, 0.1) @ v).square().sum()

    found = []
    for watched in (True, False):
        torch.manual_seed(0)
        leaves = [each.clone().requires_grad_() for each in (Q, K, V)]
        seen: list[AttentionCall] = []
        if way == "out":  # takes no gradients
            leaves = [each.detach() for each in leaves]
        if watched:
            model = Attends(loss)
            with AttentionCapture(model, seen.append):
                value = model(*leaves)
            assert len(seen) == 1
        else:
            value = loss(*leaves)
        found.append([value, *(torch.autograd.grad(value, leaves) if value.requires_grad else ())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_scores_are_held_no_longer_than_their_weights() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def noted(scores: Tensor) -> Tensor:
        alive.append(weakref.ref(scores))
        return scores

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        used = noted(q @ k.mT / 2).softmax(-1)
        out = used @ v
        assert alive[0]() is None
        dead = [noted(q @ k.mT).softmax(-1)]
        assert alive[1]() is not None
        dead.clear()
        assert alive[1]() is None
        return out

    with torch.no_grad():
        agree(only(attend, Q, K, V), SCORES)


def test_scores_are_followed_in_inference_mode() -> None:
    with torch.inference_mode():
        for way in WAYS.keys() - {
            "buffer by copies",
            "out",
        }:  # a view does not say there what it is a view of
            agree(only(lambda q, k, v, way=way: WAYS[way](q, k).softmax(-1) @ v, Q, K, V), SCORES)
        call = only(lambda q, k, v: (q @ k.mT / 2 - 1e4 * HIDDEN).softmax(-1) @ v, Q, K, V)
        agree(call, SCORES, HIDDEN)
