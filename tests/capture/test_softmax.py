"""Softmaxes that are attention, and the record of each."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabmon.capture import AttentionCapture
from stabmon.records import AttentionCall
from tests.support.attention_zoo import noise
from tests.support.probability_oracle import probabilities


class Module(nn.Module):
    """Module that runs a function in its forward."""

    def __init__(self, function, **attributes: int) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *tensors: Tensor):
        return self.function(*tensors)


def calls_of(module: nn.Module, *tensors: Tensor, **options) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    errors: list[Exception] = []
    with AttentionCapture(
        nn.ModuleDict({"a": module}), calls.append, on_error=errors.append, **options
    ):
        module(*tensors)
    assert errors == []
    return calls


def used(weights: Tensor) -> Tensor:
    """Return the weights after something was summed with them."""
    weights @ weights.new_ones(weights.shape[-1], 2)
    return weights


HIDDEN, WEIGHT = noise(2, 5, 8), noise(9, 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.linear(x, WEIGHT).softmax(-1),
        lambda x: torch.softmax(x @ WEIGHT.T / 0.7, dim=-1),
        lambda x: (x @ WEIGHT.T).log_softmax(-1),
        lambda x: F.cross_entropy((x @ WEIGHT.T).flatten(0, 1), torch.zeros(10, dtype=torch.long)),
        lambda x: torch.einsum("bsd,vd->bsv", x, WEIGHT).softmax(-1),
        lambda x: F.gumbel_softmax(F.linear(x, WEIGHT), dim=-1),
        lambda x: F.softmax(x, dim=-1) @ F.softmax(x, dim=1).mT,
        lambda x: (x @ x.mT).sum(-1).softmax(-1),
        lambda x: (x @ x.mT).softmax(-2),
    ],
    ids=[
        "router",
        "temperature",
        "log_softmax",
        "loss",
        "einsum head",
        "gumbel",
        "linear attention",
        "pooled",
        "other axis",
    ],
)
def test_a_softmax_that_is_no_attention_is_not_seen(function) -> None:
    assert calls_of(Module(function), HIDDEN) == []


Q, K = noise(2, 3, 5, 8, seed=1), noise(2, 3, 7, 8, seed=2)
FORMS = {
    "function of torch": lambda q, k: torch.softmax(torch.matmul(q, k.mT), -1),
    "method": lambda q, k: (q @ k.transpose(2, 3)).softmax(dim=-1),
    "wider type": lambda q, k: F.softmax(q.matmul(k.mT), dim=-1, dtype=torch.float64),
    "letters elsewhere": lambda q, k: torch.einsum(
        "bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)
    ).softmax(-1),
    "letters swapped": lambda q, k: torch.einsum("bhkd,bhqd->bhqk", k, q).softmax(-1),
    "list of operands": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", [q, k]).softmax(-1),
    "bias and mask": lambda q, k: (
        ((q @ k.mT) * 0.5 + noise(1, 3, 5, 7)).masked_fill(noise(5, 7) > 1, -1e9).softmax(-1)
    ),
    "where": lambda q, k: torch.where(
        noise(5, 7) > 1, torch.finfo(torch.float32).min, q @ k.mT / 2
    ).softmax(-1),
    "added constant": lambda q, k: (q @ k.mT / 2 + torch.where(noise(5, 7) > 1, -1e4, 0.0)).softmax(
        -1
    ),
    "two products": lambda q, k: (q @ k.mT + (q * 2) @ k.mT).softmax(-1),
    "unknown step": lambda q, k: (q @ k.mT).sigmoid().softmax(-1),
    "relative shift": lambda q, k: F.pad(q @ k.mT, (0, 0))[..., :7].softmax(-1),
    "baddbmm": lambda q, k: (
        torch.baddbmm(noise(6, 5, 7), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.3)
        .view(2, 3, 5, 7)
        .softmax(-1)
    ),
    "shift and bias": lambda q, k: (lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1))(
        q @ k.mT * 2 + noise(5, 7)
    ),
    "capped": lambda q, k: (torch.tanh(q @ k.mT * 0.5 / 2) * 2).softmax(-1),
}


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_are_exact_whatever_lies_between_product_and_softmax(form: str) -> None:
    own: list[Tensor] = []
    (call,) = calls_of(Module(lambda q, k: own.append(used(FORMS[form](q, k)))), Q, K)
    torch.testing.assert_close(probabilities(call), own[0].double(), atol=1e-6, rtol=1e-5)
    assert call.layer == "a"
    assert not call.fused
    assert (call.scores is None) == (call.query is not None)


@pytest.mark.parametrize("divide", [torch.div, torch.divide, torch.true_divide, Tensor.__truediv__])
def test_every_division_of_scores_is_read_as_their_scale(divide) -> None:
    (call,) = calls_of(Module(lambda q, k: used(divide(q @ k.mT, 4.0).softmax(-1))), Q, K)
    assert call.scale == 0.25
    torch.testing.assert_close(call.query, Q)


GROUPED, SHARED = noise(2, 3, 2, 5, 8, seed=3), noise(2, 3, 7, 8, seed=4)
GROUPINGS = {
    "einsum": lambda q, k: torch.einsum("bghid,bgjd->bghij", q, k).softmax(-1),
    "product": lambda q, k: (q @ k.unsqueeze(2).mT).softmax(-1),
    "dots": lambda q, k: torch.einsum("...hid,...jd->...hij", q, k).softmax(-1),
}


@pytest.mark.parametrize("how", GROUPINGS)
def test_heads_that_share_a_key_are_laid_out_in_order(how: str) -> None:
    own: list[Tensor] = []
    (call,) = calls_of(Module(lambda q, k: own.append(used(GROUPINGS[how](q, k)))), GROUPED, SHARED)
    assert torch.equal(call.query, GROUPED.flatten(1, 2))
    assert torch.equal(call.key, SHARED)
    torch.testing.assert_close(
        probabilities(call), own[0].flatten(1, 2).double(), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("heads", "shape"), [(2, (6, 2, 5, 7)), (6, (2, 6, 5, 7)), (None, (6, 2, 5, 7))]
)
def test_windows_are_batch_and_heads_are_heads(heads: int | None, shape: tuple[int, ...]) -> None:
    key = noise(2, 3, 2, 7, 8, seed=5)
    attributes = {} if heads is None else {"num_heads": heads}
    (call,) = calls_of(
        Module(lambda q, k: used((q @ k.mT).softmax(-1)), **attributes), GROUPED, key
    )
    assert probabilities(call).shape == shape
    torch.testing.assert_close(call.query @ call.key.mT, (GROUPED @ key.mT).reshape(shape))


def test_masks_of_many_scores_are_recovered_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from stabmon.capture.masks import recover

    monkeypatch.setattr(recover, "BLOCK", 40)
    for form in ("bias and mask", "where", "baddbmm", "capped"):
        own: list[Tensor] = []
        (call,) = calls_of(
            Module(lambda q, k, own=own, form=form: own.append(used(FORMS[form](q, k)))), Q, K
        )
        torch.testing.assert_close(probabilities(call), own[0].double(), atol=1e-6, rtol=1e-5)


def test_keys_hidden_from_one_head_only_are_in_the_mask() -> None:
    hidden = torch.zeros(3, 5, 7, dtype=torch.bool)
    hidden[1, 2, 3] = True
    (call,) = calls_of(
        Module(lambda q, k: used((q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1))), Q, K
    )
    assert torch.equal(call.mask, ~hidden.expand(2, 3, 5, 7))


def test_a_constant_that_hides_keys_is_not_taken_for_scores() -> None:
    for form in ("where", "added constant"):
        (call,) = calls_of(Module(lambda q, k, form=form: used(FORMS[form](q, k))), Q, K)
        assert call.scale == pytest.approx(0.5)
        assert torch.equal(call.mask, (noise(5, 7) <= 1).expand(2, 1, 5, 7))
    (call,) = calls_of(Module(lambda q, k: used(FORMS["bias and mask"](q, k))), Q, K)
    assert torch.equal(call.mask == -torch.inf, (noise(5, 7) > 1).expand(2, 3, 5, 7))


def test_scores_that_are_large_are_not_taken_for_hidden_keys() -> None:
    (call,) = calls_of(Module(lambda q, k: used((q @ k.mT).softmax(-1))), Q * 1e4, K)
    assert call.mask is None
    assert call.query is not None


@pytest.mark.parametrize(("attributes", "heads"), [({"num_heads": 3}, 3), ({}, 1)])
def test_folded_heads_are_counted_by_the_module(attributes: dict[str, int], heads: int) -> None:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        return used(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1))

    (call,) = calls_of(Module(attend, **attributes), Q, K)
    assert call.query.shape == (6 // heads, heads, 5, 8)
    assert call.key.shape == (6 // heads, heads, 7, 8)


def test_fused_attention_over_folded_heads_and_windows_is_laid_out_by_head() -> None:
    mask = noise(6, 5, 7) > 0

    def attend(q: Tensor, k: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1), attn_mask=mask
        )

    (call,) = calls_of(Module(attend, num_heads=3), Q, K)
    assert torch.equal(call.query, Q)
    assert torch.equal(call.mask, mask.view(2, 3, 5, 7))
    windows = noise(2, 4, 3, 5, 8)
    (call,) = calls_of(Module(lambda x: F.scaled_dot_product_attention(x, x, x)), windows)
    assert torch.equal(call.query, windows.view(8, 3, 5, 8))


def test_fused_causal_attention_with_more_keys_than_queries_is_aligned_at_the_top_left() -> None:
    (call,) = calls_of(
        Module(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True)), Q, K
    )
    identity = torch.eye(7).expand(2, 3, 7, 7)
    own = F.scaled_dot_product_attention(Q, K, identity, is_causal=True)
    torch.testing.assert_close(probabilities(call), own.double(), atol=1e-6, rtol=1e-5)


def test_a_named_module_s_softmax_is_attention_whatever_it_is_taken_of() -> None:
    def distance(q: Tensor, k: Tensor) -> Tensor:
        return (-torch.cdist(q, k)).softmax(-1)

    assert calls_of(Module(distance), Q, K) == []
    (call,) = calls_of(Module(distance), Q, K, modules=["a*"])
    torch.testing.assert_close(call.scores, -torch.cdist(Q, K))


def test_half_precision_scores_are_recorded_as_query_and_key() -> None:
    (call,) = calls_of(
        Module(lambda q, k: used((q @ k.mT * 8**-0.5).softmax(-1))), Q.bfloat16(), K.bfloat16()
    )
    assert call.dtype == torch.bfloat16
    assert call.mask is None
    assert call.scale == pytest.approx(8**-0.5)


def test_nested_tensors_are_refused_with_their_layer() -> None:
    nested = torch.nested.nested_tensor(
        [torch.ones(3, 2, 4), torch.ones(5, 2, 4)], layout=torch.jagged
    ).transpose(1, 2)
    errors: list[Exception] = []
    module = Module(lambda x: F.scaled_dot_product_attention(x, x, x))
    with AttentionCapture(module, print, on_error=errors.append):
        assert module(nested).is_nested
    assert [str(error).split(" attends")[0] for error in errors] == ["Module"]
