"""One forward of an unmodified model, looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from stabmon.analysis.forward import run_model
from stabmon.analysis.record import AnalysisRecord, load_record, save_record

IDS = torch.arange(24).reshape(2, 12) % 50


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=32)
    )


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = gpt2().train()
    model.transformer.h[1].eval()
    flags, state = [module.training for module in model.modules()], torch.get_rng_state()
    layers: list[str] = []
    output = run_model(
        model, {"input_ids": IDS}, lambda call: layers.append(call.layer) or torch.rand(3)
    )
    assert layers == [f"transformer.h.{i}.attn" for i in range(3)]
    assert output.past_key_values is None
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    assert not output.logits.requires_grad


def test_a_pattern_chooses_layers_and_one_that_matches_nothing_lists_them() -> None:
    layers: list[str] = []
    run_model(
        gpt2(), {"input_ids": IDS}, lambda call: layers.append(call.layer), pattern=r"h\.[12]\."
    )
    assert layers == ["transformer.h.1.attn", "transformer.h.2.attn"]
    with pytest.raises(
        ValueError,
        match=r"'decoder' matches none of the layers: transformer.h.0.attn, transformer.h.1.attn",
    ):
        run_model(gpt2(), {"input_ids": IDS}, lambda call: None, pattern="decoder")
    with pytest.raises(ValueError, match="not a valid regular expression"):
        run_model(gpt2(), {"input_ids": IDS}, lambda call: None, pattern="(")


def test_what_is_no_input_or_no_attention_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match="batch is empty"):
        run_model(gpt2(), {"input_ids": IDS[:0]}, lambda call: None)
    with pytest.raises(ValueError, match="batch is a str"):
        run_model(gpt2(), "text", lambda call: None)
    with pytest.raises(ValueError, match="no attention was found in Linear"):
        run_model(nn.Linear(3, 3), torch.ones(1, 3), lambda call: None)


def test_what_the_receiver_raises_comes_after_the_forward() -> None:
    model = gpt2()

    def look(call: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run_model(model, {"input_ids": IDS}, look)
    assert all(module.training for module in model.modules())
    assert not model._forward_hooks


def test_records_come_back_with_every_digit_and_corrupt_ones_are_named(tmp_path: Path) -> None:
    arrays = {"maps/h.0": np.random.default_rng(0).random((2, 3)).astype(np.float32)}
    record = AnalysisRecord("heatmap", {"loss": float("nan"), "layers": ["h.0"]}, arrays)
    save_record(record, tmp_path)
    again = load_record(tmp_path, "heatmap")
    assert np.isnan(again.values["loss"])
    assert again.values["layers"] == ["h.0"]
    np.testing.assert_array_equal(again.arrays["maps/h.0"], arrays["maps/h.0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "heatmap.json",
        "heatmap.safetensors",
    ]
    with pytest.raises(ValueError, match=r"patterns.json: No such file"):
        load_record(tmp_path, "patterns")
    (tmp_path / "heatmap.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"heatmap.safetensors: cannot be read"):
        load_record(tmp_path, "heatmap")
    (tmp_path / "heatmap.json").write_text('{"schema_version": 9}')
    with pytest.raises(ValueError, match="schema_version 1"):
        load_record(tmp_path, "heatmap")
