"""A controlled model of any family computes what its formulas, written out densely, say."""

from typing import Any

import pytest
import torch

from stabmon.controllers import attach_controllers, detach_controllers
from tests.support.attention_zoo import tokens, zoo
from tests.support.controlled_attention import built, dense_output, output_of, scatter

FAMILIES = (
    *(
        "gpt2-sdpa",
        "gpt2-eager",
        "gpt2_layer_scaled-sdpa",
        "llama-sdpa",
        "llama-eager",
        "mistral-sdpa",
        "mistral-eager",
    ),
    *(
        "qwen2-sdpa",
        "qwen3-sdpa",
        "gemma2-eager",
        "gemma3-sdpa",
        "gpt_neox-sdpa",
        "deepseek_v3-sdpa",
        "deepseek_v3-eager",
    ),
    *(
        "opt-sdpa",
        "bert-sdpa",
        "bert-eager",
        "vit-sdpa",
        "vit-eager",
        "t5-sdpa",
        "t5-eager",
        "whisper-sdpa",
    ),
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "key_bias": ("info_density", {"form": "key_bias"}),
    "query_gain": ("info_density", {"form": "query_gain"}),
    "both": ("info_density", {"form": "both"}),
    "linearization": ("linearization", {}),
    "linear_ramp": ("linear_ramp", {}),
    "learned_ramp": ("linear_ramp", {"learned": True}),
}
SOFTCAPPED = ("gemma2",)
"""Linear attention refuses softcaps, which a test of its own shows."""


@pytest.mark.parametrize(
    ("family", "case"),
    [
        *((family, "both") for family in FAMILIES),
        *((family, "learned_ramp") for family in FAMILIES if not family.startswith(SOFTCAPPED)),
        *(("llama-sdpa", case) for case in CASES),
    ],
)
@torch.no_grad()
def test_a_controlled_model_is_its_formulas_written_out(family: str, case: str) -> None:
    kind, options = CASES[case]
    model, inputs, _ = built(family, kind, **options)
    found, expected = output_of(model, inputs), dense_output(model, inputs)
    if "attention_mask" in inputs and "labels" not in inputs:
        counted = inputs["attention_mask"].bool()
        found, expected = found[counted], expected[counted]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_controller_changes_the_output(case: str) -> None:
    kind, options = CASES[case]
    model, inputs, _ = built("llama-sdpa", kind, **options)
    controlled = output_of(model, inputs)
    detach_controllers(model)
    assert (controlled - output_of(model, inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ["both", "learned_ramp"])
@pytest.mark.parametrize("family", ["llama-sdpa", "llama-eager", "mistral-sdpa"])
@torch.no_grad()
def test_padding_on_either_side(family: str, case: str, side: str) -> None:
    kind, options = CASES[case]
    model, _, _ = built(family, kind, **options)
    inputs = tokens(padding=4, side=side)
    counted = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        output_of(model, inputs)[counted],
        dense_output(model, inputs)[counted],
        atol=2e-4,
        rtol=1e-4,
    )


@torch.no_grad()
def test_linear_attention_under_a_softcap_is_refused() -> None:
    model, inputs, _ = built("gemma2-eager", "linearization")
    with pytest.raises(ValueError, match=r"softcap.*layers="):
        output_of(model, inputs)


@torch.no_grad()
def test_long_sequences_take_many_chunks_and_blocks_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stabmon.controllers import linear_attention

    monkeypatch.setattr(linear_attention, "CHUNK", 5)
    monkeypatch.setattr(linear_attention, "BLOCK", 1)
    model, _ = zoo()["llama-sdpa"]()
    scatter(attach_controllers(model.eval(), "linear_ramp", learned=True))
    for inputs in (tokens(43), tokens(43, padding=7)):
        counted = inputs.get("attention_mask", torch.ones(2, 43)).bool()
        found, expected = output_of(model, inputs), dense_output(model, inputs)
        torch.testing.assert_close(found[counted], expected[counted], atol=2e-4, rtol=1e-4)
