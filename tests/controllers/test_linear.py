"""Linear attention: what its weights are, and that its gradient is right."""

from typing import Any

import pytest
import torch

from stabmon.controllers import attach_controllers
from stabmon.controllers.linear_attention import linear_attention, linear_weights, sums_before
from stabmon.operator.visibility.visibility import Visibility
from tests.controllers.test_info_density import check_gradients
from tests.support.attention_zoo import tokens, zoo
from tests.support.controlled_attention import built, scatter


def test_weights_worked_by_hand() -> None:
    scores = torch.tensor([[2.0, -1.0, 5.0, 0.0], [7.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    hidden = torch.tensor(
        [[False, False, True, False], [False, True, True, True], [True, True, True, True]]
    )
    expected = torch.tensor(
        [[4 / 7, 1 / 7, 0.0, 2 / 7], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    )
    torch.testing.assert_close(linear_weights(scores, hidden), expected)


def visibility(
    queries: int, keys: int, causal: bool, mask: Any = None, window: int | None = None
) -> Visibility:
    return Visibility(queries, keys, causal, window, mask, keys - queries, torch.device("cpu"))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 5, 64, 65, 130])
def test_prefix_sums_are_the_weights_written_out(causal: bool, length: int) -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, 4, length, 8),
        torch.randn(2, 2, length, 8),
        torch.randn(2, 2, length, 6),
    )
    found = linear_attention(query, key, value, 0.3, visibility(length, length, causal))
    scores = 0.3 * query @ key.repeat_interleave(2, 1).mT
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    torch.testing.assert_close(
        found, linear_weights(scores, hidden) @ value.repeat_interleave(2, 1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("chunks", [1, 2, 9])
def test_prefix_sums_under_deterministic_algorithms_need_no_cumulative_sum(chunks: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, chunks, 4, 5, dtype=torch.float64, requires_grad=True)
    plain = sums_before(x)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.profiler.profile() as profile:
            found = sums_before(x)
            (gradient,) = torch.autograd.grad(found.square().sum(), x)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.square().sum(), x)[0])
    assert not any("cumsum" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("shape", ["causal", "full", "window", "masked", "decode"])
def test_gradients_of_all_inputs_against_finite_differences(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stabmon.controllers import linear_attention as module

    monkeypatch.setattr(module, "CHUNK", 3)
    monkeypatch.setattr(module, "BLOCK", 1)
    torch.manual_seed(0)
    queries = 2 if shape == "decode" else 20
    query, key, value = (
        torch.randn(1, heads, length, 3, dtype=torch.float64, requires_grad=True)
        for heads, length in ((2, queries), (1, 20), (1, 20))
    )
    mask = torch.rand(1, 1, queries, 20) > 0.4 if shape == "masked" else None
    see = visibility(
        queries, 20, shape in ("causal", "decode", "window"), mask, 4 if shape == "window" else None
    )
    assert torch.autograd.gradcheck(
        lambda *given: linear_attention(*given, 0.7, see), (query, key, value), fast_mode=True
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [("linearization", {}), ("linear_ramp", {}), ("linear_ramp", {"learned": True})],
)
def test_gradients_of_a_model_are_those_of_finite_differences(
    kind: str, options: dict[str, Any]
) -> None:
    model, inputs = zoo()["gpt2-sdpa"]()  # a llama's norms are taken in float32
    model = model.double()
    controllers = attach_controllers(model, kind, **options)
    scatter(controllers)
    check_gradients(model, inputs, controllers)


def test_the_ramp_falls_from_all_linear_by_equal_steps() -> None:
    model, _, controllers = built("llama-sdpa", "linear_ramp")
    assert [member.linear_share() for member in controllers.values()] == [1.0, 0.5]
    model, _ = zoo()["llama-sdpa"]()
    learned = attach_controllers(model, "linear_ramp", learned=True)
    for member, start in zip(learned.values(), (0.99, 0.5), strict=True):
        torch.testing.assert_close(member.linear_share(), torch.full((4,), start))


def test_nothing_of_the_size_of_all_scores_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench.overhead import counted

    monkeypatch.setattr("stabmon.controllers.linear_attention.BLOCK", 1 << 15)
    length = 768
    query, key, value = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 1, length, dtype=torch.bool)
    for see in (
        visibility(length, length, True),
        visibility(length, length, True, mask),
        visibility(length, length, False),
    ):
        with counted() as mode:
            linear_attention(query, key, value, 0.25, see).sum().backward()
        assert mode.peak < 0.5 * length * length * 4, see


def test_attention_that_is_linear_in_part_is_refused_where_the_shape_is_wrong() -> None:
    model, _ = zoo()["llama-sdpa"]()
    for options in ({"start": 0.5}, {"learned": True, "start": 1.5}):
        with pytest.raises(ValueError, match="start"):
            attach_controllers(model, "linear_ramp", **options)
    model(**tokens())
