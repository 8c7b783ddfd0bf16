"""Each family and implementation: every call is seen once, with the model's own probabilities."""

from functools import partial

import pytest
import torch

from tests.support.attention_zoo import HAND_WRITTEN, zoo
from tests.support.probability_oracle import (
    captured,
    of_fused_kernel,
    of_hand_written,
    of_multihead,
    returned,
)

ZOO = zoo()
LARGEST_ERROR = 1e-5


def is_from_transformers(name: str) -> bool:
    return not name.startswith(("hand_written", "multihead", "transformer_encoder"))


def compare(found: dict[str, torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for (layer, p), own in zip(found.items(), expected, strict=True):
        assert p.shape == own.shape, layer
        seen = p.isfinite().all(-1)
        assert seen.float().mean() > 0.5
        assert (p - own.double())[seen].abs().max() <= LARGEST_ERROR, layer
        assert own.double()[seen].std() > 0.01, "all rows alike: nothing is told apart"


def compare_with_eager(name: str) -> None:
    model, inputs = ZOO[name]()
    with torch.set_grad_enabled("flex" not in name):
        found, calls, records = captured(model, inputs)
    family = name.rpartition("-")[0]
    twin, _ = ZOO[f"{family}-eager" if family else name]()
    compare(found, returned(twin, inputs))
    assert list(calls.values()) == [len(records)]
    assert all(record.fused == ("-" in name and not name.endswith("-eager")) for record in records)


@pytest.mark.parametrize(
    "name",
    [n for n in ZOO if is_from_transformers(n) and n != "falcon_alibi-sdpa" and "flex" not in n],
)
def test_probabilities_seen_of_a_transformers_model_are_those_of_its_eager_copy(name: str) -> None:
    compare_with_eager(name)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["llama-flex_attention", "mistral-flex_attention"])
def test_probabilities_seen_of_flex_attention_that_transformers_compiles_are_those_of_eager(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same graph under either backend; inductor takes most of a minute to make code of it."""
    from transformers.integrations.flex_attention import WrappedFlexAttention

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)  # compiled once a process
    torch._dynamo.reset()
    compare_with_eager(name)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [name for name in ZOO if name.endswith(("-sdpa", "-fused"))])
def test_probabilities_seen_of_a_fused_call_are_its_output_for_the_identity(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = ZOO[name]()
    found, _, records = captured(model, inputs)
    compare(found, of_fused_kernel(model, inputs, monkeypatch))
    assert all(record.fused for record in records)


@pytest.mark.parametrize("name", ["multihead-fused", "multihead-weights", "transformer_encoder"])
def test_probabilities_seen_of_torch_s_multihead_attention_are_those_it_returns(name: str) -> None:
    model, inputs = ZOO[name]()
    found, calls, _ = captured(model, inputs)
    compare(found, of_multihead(model, inputs))
    assert calls == {"multihead": len(found)}


@pytest.mark.parametrize("how", HAND_WRITTEN)
def test_probabilities_seen_of_hand_written_attention_are_those_of_its_formula(how: str) -> None:
    model, inputs = ZOO[f"hand_written-{how}"]()
    with torch.set_grad_enabled("flex" not in how):
        found, calls, _ = captured(model, inputs)
    compare(found, of_hand_written(model, inputs, how))
    assert list(found) == ["blocks.0", "blocks.1"]
    assert sum(calls.values()) == 2


@pytest.mark.parametrize("how", [how for how in HAND_WRITTEN if how != "flex_score"])
def test_hand_written_attention_shows_query_and_key(how: str) -> None:
    model, inputs = ZOO[f"hand_written-{how}"]()
    with torch.set_grad_enabled("flex" not in how):
        _, _, calls = captured(model, inputs)
    for call in calls:
        assert call.query is not None
        assert call.key is not None
        assert call.query.shape == (2, 4, 12, 8)
        assert call.scale == pytest.approx(1.0 if how in ("cosine", "folded") else 8**-0.5)
        assert call.softcap == (pytest.approx(3.0) if how == "softcap" else None)
        assert call.is_causal == (how not in ("alibi", "flex"))


def test_grouped_heads_are_shown_before_they_are_expanded() -> None:
    for implementation in ("sdpa", "eager"):
        model, inputs = ZOO[f"llama-{implementation}"]()
        _, _, calls = captured(model, inputs)
        assert all(call.query.shape[1] == 4 and call.key.shape[1] == 2 for call in calls)


def test_a_shared_layer_is_named_by_its_call() -> None:
    model, inputs = ZOO["albert-sdpa"]()
    name = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    for _ in range(2):
        found, _, _ = captured(model, inputs)
        assert list(found) == [name, f"{name}#1"]


def test_the_largest_score_of_a_row_survives_a_shift_that_the_softmax_does_not_see() -> None:
    shifted, inputs = ZOO["hand_written-shifted"]()
    plain, _ = ZOO["hand_written-manual"]()
    for one, other in zip(captured(shifted, inputs)[2], captured(plain, inputs)[2], strict=True):
        scores = [call.scale * call.query @ call.key.mT for call in (one, other)]
        torch.testing.assert_close(*scores)
        assert one.mask is None
