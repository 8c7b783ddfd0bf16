"""Names of modules, whatever wraps them."""

import pytest
from torch import nn

from stabmon.capture import AttentionCapture, clean_name
from stabmon.capture.names import ModuleNames
from tests.support.attention_zoo import zoo


@pytest.mark.parametrize(
    ("wrapped", "clean"),
    [
        ("transformer.h.0.attn", "transformer.h.0.attn"),
        ("module.transformer.h.0.attn", "transformer.h.0.attn"),
        ("_orig_mod.module.blocks.1", "blocks.1"),
        ("module._orig_mod.base_model.model.model.layers.0.self_attn", "model.layers.0.self_attn"),
        (
            "model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn",
            "model.layers.0.self_attn",
        ),
        ("layers.3._orig_mod.attn", "layers.3.attn"),
        ("m.blocks.0", "blocks.0"),
        ("blocks.0.module.attn", "blocks.0.module.attn"),
        ("encoder.m.attn", "encoder.m.attn"),
        ("", ""),
    ],
)
def test_a_name_is_what_the_author_wrote(wrapped: str, clean: str) -> None:
    assert clean_name(wrapped) == clean


def test_calls_of_one_module_are_numbered_within_a_forward() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    names = ModuleNames(model)
    assert [names.next_layer(model[0]) for _ in range(3)] == ["0", "0#1", "0#2"]
    assert names.next_layer(model[1]) == "1"
    names.new_forward()
    assert names.next_layer(model[0]) == "0"
    assert nn.Linear(1, 1) not in names


def test_two_forwards_in_one_opening_have_the_same_names() -> None:
    model, inputs = zoo()["hand_written-fused"]()
    layers: list[str] = []
    with AttentionCapture(model, lambda call: layers.append(call.layer)):
        model(**inputs)
        model(**inputs)
    assert layers == ["blocks.0", "blocks.1"] * 2


def test_a_model_that_is_itself_the_attention_is_called_by_its_class() -> None:
    model, inputs = zoo()["hand_written-fused"]()
    layers: list[str] = []
    with AttentionCapture(model.blocks[0], lambda call: layers.append(call.layer)):
        model(**inputs)
    assert layers == ["Attention"]
