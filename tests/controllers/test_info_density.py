"""Where info_density starts, what it can do, and what its naive form could not."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from stabmon.controllers import attach_controllers, controller
from stabmon.controllers.base import CONTROLLERS, Controller
from stabmon.controllers.features import biases, changed_query, key_features, query_features
from stabmon.controllers.info_density import InfoDensity
from tests.support.attention_zoo import tokens, zoo
from tests.support.controlled_attention import built, output_of, scatter

FORMS = ("key_bias", "query_gain", "both")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "family", ["gpt2-sdpa", "llama-eager", "mistral-sdpa", "bert-sdpa", "vit-sdpa"]
)
@torch.no_grad()
def test_it_starts_as_the_identity(family: str, form: str) -> None:
    model, inputs = zoo()[family]()
    before = output_of(model.eval(), inputs)
    attach_controllers(model, "info_density", form=form)
    after = output_of(model, inputs)
    if form == "query_gain":
        assert torch.equal(before, after)
    else:  # one feature more may be summed in another order
        torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_its_gradient_does_not_vanish_where_it_starts(form: str) -> None:
    model, inputs = zoo()["llama-sdpa"]()
    controllers = attach_controllers(model, "info_density", form=form)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in controllers.named_parameters():
        if not name.endswith("key_bias_bias"):  # the same number for every key cancels
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-6, name


def test_a_number_added_by_query_cancels_to_the_last_gradient() -> None:
    """The form that does nothing: the same number for every key of a row leaves softmax as it
    is.
    """
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 16, dtype=torch.float64)
    weight = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    value = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    hidden_keys = torch.ones(9, 9, dtype=torch.bool).triu(1)
    density = torch.tanh(torch.nn.functional.layer_norm(hidden, (16,)) @ weight.T).transpose(1, 2)

    def attend(scores: Tensor) -> Tensor:
        return torch.softmax(scores.masked_fill(hidden_keys, -torch.inf), dim=-1) @ value

    by_query = attend(scores + density[:, :, :, None])
    torch.testing.assert_close(by_query, attend(scores), atol=1e-14, rtol=0)
    (gradient,) = torch.autograd.grad(by_query.square().sum(), weight, retain_graph=True)
    assert gradient.abs().max() < 1e-13
    by_key = attend(scores + density[:, :, None, :])
    (gradient,) = torch.autograd.grad(by_key.square().sum(), weight)
    assert gradient.abs().max() > 1e-2
    assert (by_key - attend(scores)).abs().max() > 1e-2


def test_a_number_added_by_query_is_inert_to_the_last_bit_where_nothing_rounds() -> None:
    torch.manual_seed(0)
    scores = torch.randint(-8, 8, (2, 4, 9, 9)).double()
    value = torch.randint(-8, 8, (2, 4, 9, 8)).double()
    added = torch.randint(-8, 8, (2, 4, 9, 1)).double()
    assert torch.equal(torch.softmax(scores + added, -1) @ value, torch.softmax(scores, -1) @ value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "family", ["gpt2-sdpa", "gpt_neox-sdpa"]
)  # the others' norms are taken in float32
def test_gradients_are_those_of_finite_differences(family: str, form: str) -> None:
    model, inputs = zoo()[family]()
    model = model.double()
    controllers = attach_controllers(model, "info_density", form=form)
    scatter(controllers)
    check_gradients(model, inputs, controllers)


def test_gradients_where_query_heads_share_a_key_head() -> None:
    torch.manual_seed(0)
    query, key, value, bias = (
        torch.randn(2, h, 6, *d, dtype=torch.float64)
        for h, d in ((4, (3,)), (2, (3,)), (2, (3,)), (4, ()))
    )

    gain = torch.rand(2, 4, 6, dtype=torch.float64) + 0.5

    def attend(query: Tensor, key: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
        features = key_features(bias, 2, torch.float64)
        asking = changed_query(query, gain, query_features(query, 0.5, 2, features.shape[-1]))
        given = torch.nn.functional.pad(value, (0, features.shape[-1]))
        keys = torch.cat((key, features), -1)
        return torch.nn.functional.scaled_dot_product_attention(
            asking, keys, given, scale=0.5, is_causal=True, enable_gqa=True
        )

    scores = 0.5 * (gain[..., None] * query) @ key.repeat_interleave(2, 1).mT + bias[:, :, None, :]
    weights = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    torch.testing.assert_close(
        attend(query, key, bias, gain)[..., :3], weights @ value.repeat_interleave(2, 1)
    )
    assert torch.autograd.gradcheck(
        attend, [each.requires_grad_() for each in (query, key, bias, gain)], fast_mode=True
    )
    torch.testing.assert_close(biases(key_features(bias, 2, torch.float64), 4), bias)


def check_gradients(
    model: Any, inputs: dict[str, Any], controllers: Any, step: float = 1e-6
) -> None:
    """The gradient along a random direction of all controller parameters, and along one of the
    embedding.
    """

    def loss() -> Tensor:  # the library's own is taken in float32
        return torch.nn.functional.cross_entropy(
            model(**inputs).logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
        )

    embedding = model.get_input_embeddings().weight
    groups = [list(controllers.parameters()), [embedding]]
    for group in groups:
        if not group:
            continue
        gradients = torch.autograd.grad(loss(), group)
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            ways = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in group]
            expected = sum((g * w).sum() for g, w in zip(gradients, ways, strict=True))
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    for p, w in zip(group, ways, strict=True):
                        p.add_(sign * step * w)
                    losses.append(loss())
                    for p, w in zip(group, ways, strict=True):
                        p.sub_(sign * step * w)
            torch.testing.assert_close(
                (losses[0] - losses[1]) / (2 * step), expected, rtol=1e-5, atol=1e-8
            )


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_numbers_stay_within_their_bounds(form: str) -> None:
    _, _, controllers = built("llama-sdpa", form=form, bias_max=0.5, gain_max=2.0)
    member: Any = next(iter(controllers.values()))
    for parameter in member.parameters():
        parameter.mul_(100)
    hidden = torch.randn(2, 7, 32)
    bias, gain = member.key_bias(hidden), member.query_gain(hidden)
    assert bias is None or (bias.shape == (2, 4, 7) and 0.49 < bias.abs().max() <= 0.5)
    assert gain is None or (
        gain.shape == (2, 4, 7) and gain.max() <= 2.0 + 1e-6 and gain.min() >= 0.5 - 1e-6
    )


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"form": "value_bias"}, "form"),
        ({"bias_max": 0.0}, "bias_max"),
        ({"gain_max": 1.0}, "gain_max"),
        ({"gian": 2}, "gian"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], word: str) -> None:
    model, _ = zoo()["llama-sdpa"]()
    with pytest.raises(ValueError, match=word):
        attach_controllers(model, "info_density", **options)
    assert not any("stabmon" in name for name, _ in model.named_modules())


def test_anyone_can_add_a_controller_of_a_formula() -> None:
    class RecentBias(Controller):
        """Half a nat for every second token."""

        def key_bias(self, hidden: Tensor) -> Tensor:
            return (
                0.5
                * torch.ones(len(hidden), self.site.heads, hidden.shape[1])
                * (torch.arange(hidden.shape[1]) % 2)
            )

    known = [*CONTROLLERS, "recent_bias"]
    with CONTROLLERS.temporarily("recent_bias", RecentBias):
        assert controller(RecentBias) is RecentBias
        assert list(CONTROLLERS) == sorted(known)
        model, inputs = zoo()["llama-sdpa"]()
        before = output_of(model.eval(), inputs)
        attach_controllers(model, "recent_bias")
        assert not torch.allclose(output_of(model, inputs), before, atol=1e-3)


def test_training_only_the_controllers_lowers_the_loss() -> None:
    model, _ = zoo()["gpt2-sdpa"]()
    model.requires_grad_(False)
    frozen = copy.deepcopy(dict(model.named_parameters()))
    controllers = attach_controllers(model, "info_density", form="both")
    optimizer = torch.optim.Adam(controllers.parameters(), 0.05)
    data, losses = tokens(24), []
    for _ in range(12):
        loss = model(**data, labels=data["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(
        torch.equal(frozen[name], value)
        for name, value in model.named_parameters()
        if name in frozen
    )
    assert isinstance(next(iter(controllers.values())), InfoDensity)
