"""Patterns over checkpoints, stored readings and generation; scores taken apart by feature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stabmon.analysis.patterns.api import attention_patterns
from stabmon.analysis.patterns.evolution import (
    patterns_over_checkpoints,
    patterns_over_training,
)
from stabmon.analysis.patterns.generation import patterns_over_generation
from stabmon.analysis.patterns.neurons import score_contributions
from stabmon.records import Reading

IDS = torch.randint(3, 50, (2, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :6] = 0


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.3)
    return model


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


def test_checkpoints_of_every_kind_give_the_models_own_patterns(tmp_path: Path) -> None:
    model = gpt2()
    others = []
    for factor in (1.0, 2.0, 3.0):
        other = gpt2()
        with torch.no_grad():
            other.transformer.h[0].attn.c_attn.weight.mul_(5 * factor)
        others.append(other)
    others[1].save_pretrained(tmp_path / "checkpoint-20")
    state = {n: w.contiguous().clone() for n, w in others[2].state_dict().items()}
    save_file(state, tmp_path / "step30.safetensors")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = patterns_over_checkpoints(
        model,
        [
            (10, others[0].state_dict()),
            tmp_path / "checkpoint-20",
            tmp_path / "step30.safetensors",
            (40, model),
        ],
        {"input_ids": IDS, "attention_mask": MASK},
    )
    assert found.steps == (10, 20, 30, 40)
    for step, other in enumerate([*others, gpt2()]):
        own = attention_patterns(other, {"input_ids": IDS, "attention_mask": MASK}, advice=False)
        for layer in own.layers:
            for name, value in own.statistics[layer].items():
                np.testing.assert_array_equal(found.statistics[layer][name][step], value)
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())
    record = found.to_record()
    assert record.arrays["statistics/transformer.h.0.attn"].shape[1:] == (4, 2, 4)


def test_a_checkpoint_that_does_not_fit_is_refused_and_the_model_restored(tmp_path: Path) -> None:
    model = gpt2()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    wrong = {name: 0 * weight for name, weight in model.state_dict().items()}
    del wrong["transformer.ln_f.weight"]
    for checkpoint, reason in (
        (wrong, "lacks transformer.ln_f.weight"),
        (wrong | {"x": torch.ones(1)}, "does not fit"),
        (tmp_path, "holds no model"),
        (tmp_path / "none.safetensors", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=reason):
            patterns_over_checkpoints(model, [checkpoint], {"input_ids": IDS})
    with pytest.raises(ValueError, match="no checkpoints"):
        patterns_over_checkpoints(model, [], {"input_ids": IDS})
    assert all(torch.equal(before[name], w) for name, w in model.state_dict().items())


def test_readings_become_an_evolution() -> None:
    layers = [{"h.0": {"attention_entropy": np.array([1.0, 2.0]) * step}} for step in (1, 2)]
    found = patterns_over_training([Reading(step, None, each) for step, each in enumerate(layers)])
    assert found.statistics["h.0"]["attention_entropy"].tolist() == [[[1, 2]], [[2, 4]]]
    with pytest.raises(ValueError, match="no readings"):
        patterns_over_training([])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_each_step_of_generation_equals_a_forward_over_the_tokens_so_far(cache: str) -> None:
    model = llama()
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    state = torch.get_rng_state()
    found = patterns_over_generation(model, inputs, max_new_tokens=5, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.steps == (0, 1, 2, 3, 4)
    assert found.tokens is not None
    plain = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert np.array_equal(found.tokens, plain.numpy())
    for step in found.steps:
        length = IDS.shape[1] + step
        ids = torch.from_numpy(found.tokens[:, :length])
        mask = torch.cat([MASK, torch.ones(2, step, dtype=torch.int64)], 1)
        whole = attention_patterns(model, {"input_ids": ids, "attention_mask": mask}, advice=False)
        for layer in whole.layers:
            for name, value in whole.statistics[layer].items():
                mine = found.statistics[layer][name][step]
                np.testing.assert_allclose(mine, value, rtol=1e-4, atol=1e-5, err_msg=name)
            row = found.rows[layer][step][:, :length]
            np.testing.assert_allclose(row, whole.rows[layer].mean(1), atol=1e-5)
            if cache == "dynamic":
                assert np.isnan(found.rows[layer][step][:, length:]).all()


def test_a_score_is_the_sum_of_its_features() -> None:
    model = llama(attn_implementation="eager")
    batch = {"input_ids": IDS, "attention_mask": MASK}
    found = score_contributions(model, batch, layer=r"layers\.1\.", sample=1, query=-2)
    assert (found.layer, found.query) == ("model.layers.1.self_attn", 18)
    with torch.no_grad():
        weights: Tensor = model(**batch, output_attentions=True).attentions[1][1, :, 18]
    np.testing.assert_array_equal(found.keys, weights.argmax(-1))
    np.testing.assert_allclose(found.weights, weights.amax(-1), atol=1e-5)
    first = score_contributions(model, batch, layer=r"layers\.1\.", sample=1, query=-2, key=6)
    last = score_contributions(model, batch, layer=r"layers\.1\.", sample=1, query=-2, key=9)
    ratio = np.exp(first.contributions.sum(1) - last.contributions.sum(1))
    np.testing.assert_allclose(ratio, weights[:, 6] / weights[:, 9], rtol=1e-4)
    assert [abs(x) for _, x in found.top[0]] == sorted((abs(x) for _, x in found.top[0]))[::-1]
    with pytest.raises(ValueError, match="name one of them"):
        score_contributions(model, batch, layer="self_attn")
    with pytest.raises(ValueError, match="key 99"):
        score_contributions(model, batch, layer=r"layers\.1\.", key=99)
