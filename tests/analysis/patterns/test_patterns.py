"""Statistics of attention patterns against a dense float64 reference, on real models."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from stabmon.analysis.patterns.api import AttentionPatterns, attention_patterns
from stabmon.analysis.record import load_record, save_record

LENGTH = 40
IDS = torch.randint(3, 50, (3, LENGTH), generator=torch.Generator().manual_seed(0))
LEFT, RIGHT = torch.ones_like(IDS), torch.ones_like(IDS)
LEFT[1, :7] = LEFT[2, :31] = 0
RIGHT[0, 35:] = RIGHT[2, 20:] = 0


def sharpened(model: nn.Module, size: float = 0.25) -> nn.Module:
    """The model with queries that make its attention uneven."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "norm" not in name and "embed" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * size)
    return model.eval()


def llama(**changes: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    return sharpened(LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))))


def mistral() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    return sharpened(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=9)))


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    return sharpened(BertModel(BertConfig(**sizes, num_attention_heads=4, vocab_size=50)))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, vocab_size=50, decoder_start_token_id=0, pad_token_id=0)
    return sharpened(T5ForConditionalGeneration(config), 0.12)


def row_statistics(row: np.ndarray, context: np.ndarray, own: int | None) -> dict[str, float]:
    """Statistics of one row of float64 weights, spelt out."""
    kept = [float(row[j]) for j in context]
    n = len(kept)
    mean = sum(kept) / n
    variance = sum((x - mean) ** 2 for x in kept) / n
    entropy = -sum(x * math.log(x) for x in kept if x > 0)
    quarter = max(1, n // 4)
    distance = math.nan
    if own is not None:
        distance = sum(float(row[j]) * abs(own - j) for j in range(len(row)))
    return {
        "mean": mean,
        "variance": variance,
        "std": math.sqrt(variance),
        "entropy": entropy,
        "normalized_entropy": entropy / math.log(n),
        "max_entropy": math.log(n),
        "focus": 1 / entropy,
        "max": max(kept),
        "argmax": float(context[int(np.argmax(kept))]),
        "context_size": n,
        "context_mass": sum(kept),
        "recent_distant_ratio": sum(kept[-quarter:]) / sum(kept[:quarter]),
        "mean_distance": distance,
    }


def reference(
    weights: Tensor, queries: Tensor, keys: Tensor, own: bool, window: int | None, causal: bool
) -> list[list[dict[int, dict[str, float]]]]:
    """[sample][head][valid query] -> statistics, from eager attention in float64."""
    found: list[list[dict[int, dict[str, float]]]] = []
    for b in range(len(weights)):
        visible = [j for j in range(weights.shape[-1]) if keys[b, j]]
        found.append([])
        for h in range(weights.shape[1]):
            rows = {}
            for i in range(weights.shape[2]):
                if not queries[b, i]:
                    continue
                seen = [j for j in visible if not causal or j <= i]
                seen = [j for j in seen if window is None or i - j < window]
                context = np.array([j for j in seen if not own or j != i])
                if len(context) < 2:
                    continue
                row = weights[b, h, i].numpy()
                rows[i] = row_statistics(row, context, i if own else None)
                rows[i]["sink_mass"] = float(row[visible[0]])
            found[-1].append(rows)
    return found


def compare(
    found: AttentionPatterns, layer: str, expected: list[list[dict[int, dict[str, float]]]]
) -> None:
    statistics, over = found.statistics[layer], found.over_queries[layer]
    for b, heads in enumerate(expected):
        for h, rows in enumerate(heads):
            last = max(rows)
            assert found.positions[layer][b] == last
            assert found.queries[layer][b] == len(rows)
            for name, value in rows[last].items():
                assert statistics[name][b, h] == pytest.approx(
                    value, rel=1e-5, abs=1e-5, nan_ok=True
                ), name
            for name in ("entropy", "normalized_entropy", "sink_mass", "recent_distant_ratio"):
                mean = sum(row[name] for row in rows.values()) / len(rows)
                assert over[name][b, h] == pytest.approx(mean, rel=2e-5, abs=1e-5), name


def dense(model: nn.Module, ids: Tensor, mask: Tensor, **more: Tensor) -> dict[str, list[Tensor]]:
    """Eager attention in float64 of each sample alone and unpadded, put where its tokens stand."""
    oracle: Any = copy.deepcopy(model).double()
    oracle.set_attn_implementation("eager")
    found: dict[str, list[Tensor]] = {}
    for b in range(len(ids)):
        kept = mask[b].bool()
        one = {name: value[b : b + 1] for name, value in more.items()}
        with torch.no_grad():
            output = oracle(input_ids=ids[b : b + 1, kept], output_attentions=True, **one)
        for kind in ("attentions", "encoder_attentions", "cross_attentions"):
            for layer, weights in enumerate(output.get(kind) or ()):
                maps = found.setdefault(kind, [])
                if len(maps) == layer:
                    queries = weights.shape[2] if kind == "cross_attentions" else ids.shape[1]
                    shape = (len(ids), weights.shape[1], queries, ids.shape[1])
                    maps.append(torch.zeros(shape, dtype=torch.float64))
                rows = kept if kind != "cross_attentions" else torch.ones(queries).bool()
                for h in range(weights.shape[1]):
                    maps[layer][b, h][rows[:, None] & kept] = weights[0, h].flatten()
    return found


CASES = {
    "causal": (llama, None, None, True),
    "left padded": (llama, LEFT, None, True),
    "right padded": (llama, RIGHT, None, True),
    "window": (mistral, LEFT, 9, True),
    "bidirectional": (bert, None, None, False),
    "bidirectional padded": (bert, RIGHT, None, False),
}


@pytest.mark.parametrize("case", CASES)
def test_statistics_equal_a_dense_reference(case: str) -> None:
    make, mask, window, causal = CASES[case]
    model = make()
    batch = {"input_ids": IDS} | ({} if mask is None else {"attention_mask": mask})
    found = attention_patterns(model, batch, advice=False)
    kept = torch.ones_like(IDS) if mask is None else mask
    maps = dense(model, IDS, kept)["attentions"]
    assert len(maps) == len(found.layers) == 2
    for layer, weights in zip(found.layers, maps, strict=True):
        expected = reference(weights, kept, kept, True, window, causal)
        compare(found, layer, expected)
        received = weights.sum(2).numpy()
        np.testing.assert_allclose(found.received[layer], received, atol=1e-5)
        rows = np.stack([weights[b, :, p] for b, p in enumerate(found.positions[layer])])
        np.testing.assert_allclose(found.rows[layer], rows, atol=1e-5)
        assert found.kinds[layer] == ("causal" if causal else "bidirectional")
    means = torch.stack([weights.mean(1).flatten(1) for weights in maps], 1)
    cosine = torch.nn.functional.cosine_similarity(means[:, 0], means[:, 1], dim=-1)
    assert found.similarity is not None
    np.testing.assert_allclose(found.similarity.cosine[:, 0, 1], cosine, atol=1e-5)
    np.testing.assert_allclose(found.similarity.cosine[:, 1, 1], 1, atol=1e-6)


def test_cross_attention_has_all_visible_keys_as_context() -> None:
    model = t5()
    labels = IDS[:, :18].clone()
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels}
    found = attention_patterns(model, batch, advice=False)
    maps = dense(model, IDS, RIGHT, labels=labels)
    cross = [layer for layer, kind in found.kinds.items() if kind == "cross"]
    assert sorted(found.kinds.values()) == ["bidirectional"] * 2 + ["causal"] * 2 + ["cross"] * 2
    every = torch.ones(3, 18)
    for layer, weights in zip(cross, maps["cross_attentions"], strict=True):
        compare(found, layer, reference(weights, every, RIGHT, False, None, False))
        assert np.isnan(found.statistics[layer]["mean_distance"]).all()
    encoder = [layer for layer in found.layers if layer.startswith("encoder")]
    for layer, weights in zip(encoder, maps["encoder_attentions"], strict=True):
        compare(found, layer, reference(weights, RIGHT, RIGHT, True, None, False))
    roles = {role.role for role in found.roles if role.layer in cross}
    assert roles <= {"sink", "uniform", "mixed"}


def test_padding_on_either_side_changes_nothing() -> None:
    model = sharpened(GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)))
    plain = attention_patterns(model, {"input_ids": IDS[:1, :30]}, advice=False)
    pad = torch.full((1, 10), 3)
    for ids, mask in (
        (torch.cat([IDS[:1, :30], pad], 1), [1] * 30 + [0] * 10),
        (torch.cat([pad, IDS[:1, :30]], 1), [0] * 10 + [1] * 30),
    ):
        kept = torch.tensor([mask])
        places = {"position_ids": (kept.cumsum(-1) - 1).clamp(min=0)}
        batch = {"input_ids": ids, "attention_mask": kept, **places}
        padded = attention_patterns(model, batch, advice=False)
        for layer in plain.layers:
            for name, value in plain.statistics[layer].items():
                if name != "argmax":
                    np.testing.assert_allclose(padded.statistics[layer][name], value, atol=1e-5)
            for name, value in plain.over_queries[layer].items():
                np.testing.assert_allclose(padded.over_queries[layer][name], value, rtol=1e-4)
        assert [r.role for r in padded.roles] == [r.role for r in plain.roles]


def test_any_query_may_be_asked() -> None:
    model, batch = llama(), {"input_ids": IDS, "attention_mask": LEFT}
    found = attention_patterns(model, batch, query=-4, advice=False)
    assert found.positions[found.layers[0]].tolist() == [36, 36, 36]
    early = attention_patterns(model, batch, query=20, advice=False, similarity=False)
    assert early.positions[early.layers[0]].tolist() == [20, 20, -1]
    assert np.isnan(early.statistics[early.layers[0]]["entropy"][2]).all()
    right = {"input_ids": IDS, "attention_mask": RIGHT}
    last = attention_patterns(model, right, query=-2, advice=False, similarity=False)
    assert last.positions[last.layers[0]].tolist() == [33, 38, 18]
    with pytest.raises(ValueError, match="query 60"):
        attention_patterns(model, batch, query=60, advice=False)


def test_a_decoder_of_torch_attends_across_whatever_the_lengths() -> None:
    torch.manual_seed(0)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 1)
    x, memory = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    found = attention_patterns(decoder, (x, memory), advice=False)
    assert list(found.kinds.values()) == ["bidirectional", "cross"]


def test_a_vision_model_has_no_tokens_to_test_induction_on() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = ViTConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=8)
    model = sharpened(ViTModel(config, add_pooling_layer=False))
    found = attention_patterns(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, advice=False)
    assert found.kinds[found.layers[0]] == "bidirectional"
    untestable = found.roles[0].evidence["not_testable"]
    assert untestable["induction"] == untestable["duplicate_token"] == "the batch has no token ids"


def test_the_record_keeps_every_number(tmp_path: Any) -> None:
    found = attention_patterns(llama(), {"input_ids": IDS}, advice=False, map_size=16)
    save_record(found.to_record(), tmp_path)
    record = load_record(tmp_path, "patterns")
    layer = found.layers[1]
    names = record.values["statistics_names"]
    stored = record.arrays[f"statistics/{layer}"][names.index("entropy")]
    np.testing.assert_array_equal(stored, found.statistics[layer]["entropy"])
    assert record.values["pooling"][layer] == [3, 3]
    assert record.arrays[f"maps/{layer}"].shape == (4, 14, 14)
    assert [role["role"] for role in record.values["roles"]] == [r.role for r in found.roles]
