"""CAKE's numbers against a dense float64 oracle, and what a report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from stabmon.analysis.kv_cache import compressed_generate, simulate_cache, simulate_cake
from stabmon.analysis.kv_cache.budgets import filled
from stabmon.analysis.record import load_record, save_record
from tests.support.cache_models import MAKERS, gemma3, llama, tokens

LENGTH, WINDOW, CACHE = 48, 8, 20
WITHIN = 1e-4


def near(given: Any, expected: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(given).double(),
        torch.as_tensor(expected).double(),
        rtol=WITHIN,
        atol=WITHIN,
    )


@torch.no_grad()
def oracle(
    model: Any, ids: Tensor, key_heads: int, tau1: float, tau2: float, gamma: float
) -> list[dict[str, Tensor]]:
    """One sample's numbers of every layer, from attention maps written out in float64."""
    model = model.double()
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True, use_cache=False).attentions
    model.float()
    found = []
    for one in maps:
        p = one[0, :, -WINDOW:, :]  # [H, w, n]; transformers' softmax is float32
        p = p.double()
        outside = p[:, :, : p.shape[-1] - WINDOW]
        d = -(outside * outside.clamp(min=1e-300).log()).sum()
        mean = outside.sum(1) / WINDOW
        variance = ((outside - mean[:, None]) ** 2).sum(1) / (WINDOW - 1)
        raw = mean + gamma * variance
        smooth = torch.zeros_like(raw)
        for j in range(raw.shape[1]):
            for k in range(j - 2, j + 3):
                if 0 <= k < raw.shape[1]:
                    smooth[:, j] += raw[:, k] / 5
        groups = len(raw) // key_heads
        score = torch.stack(
            [smooth[h * groups : (h + 1) * groups].mean(0) for h in range(key_heads)]
        )
        found.append({"dispersion": d, "shift": variance.sum(), "scores": score})
        found[-1]["preference"] = d ** (1 / tau1) * variance.sum() ** (1 / tau2)
    return found


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("taus", [(1.0, 1.0), (1.6, 0.7)])
def test_numbers_equal_a_dense_float64_oracle(maker: str, taus: tuple[float, float]) -> None:
    model, ids = MAKERS[maker](), tokens(2, LENGTH)
    report = simulate_cake(
        model, ids, cache_size=CACHE, window_size=WINDOW, tau1=taus[0], tau2=taus[1], gamma=50.0
    )
    assert len(report.layers) == 3
    before = LENGTH - WINDOW
    for sample in range(2):
        expected = oracle(
            model, ids[sample : sample + 1], report.layers[0].kept.shape[1], *taus, 50.0
        )
        for layer, numbers in zip(report.layers, expected, strict=True):
            near(layer.dispersion[sample], numbers["dispersion"])
            near(layer.shift[sample], numbers["shift"])
            near(layer.preference[sample], numbers["preference"])
            near(layer.scores[sample, :, :before], numbers["scores"])
        claims = [float(numbers["preference"]) for numbers in expected]
        budgets = [int(layer.budget[sample]) for layer in report.layers]
        assert sum(budgets) == (CACHE - WINDOW) * 3
        assert np.abs(np.array(budgets) - filled(claims, sum(budgets), before)).max() <= 1
        for layer, numbers, budget in zip(report.layers, expected, budgets, strict=True):
            for head, score in enumerate(numbers["scores"]):
                kept = [j for j in layer.kept[sample, head].tolist() if j >= 0]
                assert kept == sorted(kept)
                assert kept[budget:] == list(range(before, LENGTH)), "the window stays"
                chosen = score[kept[:budget]]
                rest = score[[j for j in range(before) if j not in kept]]
                assert len(chosen) == budget
                assert not len(rest) or chosen.min() >= rest.max() - WITHIN * rest.max()


@pytest.mark.parametrize("maker", ["llama", "gpt2"])
def test_padding_on_either_side_changes_no_number(maker: str) -> None:
    model, ids = MAKERS[maker](), tokens(1, LENGTH)
    alone = simulate_cake(model, ids, cache_size=CACHE, window_size=WINDOW)
    for left, right in ((5, 0), (0, 5)):
        padded = functional.pad(ids, (left, right))
        mask = functional.pad(torch.ones_like(ids), (left, right))
        both = {
            "input_ids": torch.cat([padded, tokens(1, LENGTH + 5, seed=9)]),
            "attention_mask": torch.cat([mask, torch.ones_like(mask)]),
        }
        report = simulate_cake(model, both, cache_size=CACHE, window_size=WINDOW)
        assert report.lengths == (LENGTH, LENGTH + 5)
        for one, layer in zip(alone.layers, report.layers, strict=True):
            near(layer.dispersion[0], one.dispersion[0])
            near(layer.shift[0], one.shift[0])
            near(
                layer.scores[0, :, left : left + LENGTH - WINDOW],
                one.scores[0, :, : LENGTH - WINDOW],
            )
            assert int(layer.budget[0]) == int(one.budget[0])
            assert [[j - left for j in row if j >= 0] for row in layer.kept[0].tolist()] == [
                [j for j in row if j >= 0] for row in one.kept[0].tolist()
            ]
            assert bool((layer.evicted_at[0, :, :left] == -2).all())


@pytest.mark.parametrize("policy", ["cake", "h2o", "recency", "snapkv", "pyramid", "random"])
def test_preserved_shares_equal_sums_over_dense_maps(policy: str) -> None:
    model, ids = llama(attn_implementation="eager"), tokens(1, LENGTH)
    report = simulate_cache(model, ids, policy=policy, cache_size=CACHE, window_size=WINDOW)
    with torch.no_grad():
        maps = model(ids, output_attentions=True, use_cache=False).attentions
    for layer, one in zip(report.layers, maps, strict=True):
        p = one[0, :, -WINDOW:].double()
        kept = [[j for j in row if j >= 0] for row in layer.kept[0].tolist()]
        mass = sum(p[head][:, kept[head // 2]].sum() for head in range(4)) / p.sum()
        near(layer.preserved["kept"]["mass"][0], mass)
        variance = p[..., : LENGTH - WINDOW].var(1)
        held = sum(
            variance[head, [j for j in kept[head // 2] if j < LENGTH - WINDOW]].sum()
            for head in range(4)
        )
        near(layer.preserved["kept"]["variance"][0], held / variance.sum())
        group = p.unflatten(0, (2, 2)).sum((1, 2))
        most = sum(group[head].topk(len(kept[head])).values.sum() for head in range(2)) / p.sum()
        near(layer.preserved["best"]["mass"][0], most)
        assert all(shares["mass"][0] <= most + WITHIN for shares in layer.preserved.values())
        if policy == "h2o":
            received = one[0].double().sum(1).unflatten(0, (2, 2)).mean(1)
            near(layer.scores[0, :, : LENGTH - WINDOW], received[:, : LENGTH - WINDOW])
            near(layer.preserved["kept"]["mass"], layer.preserved["h2o"]["mass"])


def test_report_says_what_decoding_evicts() -> None:
    model, ids = llama(), tokens(2, LENGTH)
    report = simulate_cake(model, ids, cache_size=CACHE, window_size=WINDOW, max_new_tokens=6)
    assert report.tokens.shape == (2, 6)
    assert report.decode_steps == 5
    assert report.eviction_frequency == 1.0, (
        "every layer is full, so that each new token drives one out"
    )
    assert report.budget_use == 1.0
    assert report.compression_ratio == pytest.approx(CACHE / LENGTH)
    for layer in report.layers:
        for step in range(6):
            held = layer.kept_at(step)
            assert bool((held.sum(-1) == (layer.budget + WINDOW)[:, None]).all())
            assert bool(held[..., LENGTH + step - WINDOW : LENGTH + step].all()), "the newest stay"
            assert not bool(held[..., LENGTH + step :].any())
    with torch.no_grad():
        logits = model(torch.cat([ids, report.tokens[:, :-1]], 1), use_cache=False).logits[
            :, LENGTH - 1 :
        ]
    scored = logits.log_softmax(-1).gather(-1, report.tokens[..., None])[..., 0]
    near(report.full_log_probabilities, scored)
    assert report.full_perplexity == pytest.approx(float(torch.exp(-scored.mean())), rel=1e-4)
    assert report.perplexity != pytest.approx(report.full_perplexity, rel=1e-4)


def test_record_comes_back_and_holds_every_layer(tmp_path: Path) -> None:
    report = simulate_cake(gemma3(), tokens(1, 40), cache_size=0.5, window_size=4, max_new_tokens=3)
    assert set(report.left_out) == {"model.layers.0.self_attn", "model.layers.2.self_attn"}
    save_record(report.to_record(), tmp_path)
    record = load_record(tmp_path, "cake")
    names = record.values["layers"]
    assert names == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
    assert record.arrays["budget"].shape == (2, 1)
    assert record.arrays["preserved"].shape == (2, len(record.values["choices"]), 3, 1)
    assert record.arrays["stages"][-1].sum() == record.arrays["budget"].sum() == 2 * (20 - 4)
    for name in names:
        assert record.arrays[f"kept/{name}"].shape[:2] == (1, 2)
        assert record.arrays[f"evicted_at/{name}"].shape == (1, 2, 42)


class HandWritten(nn.Module):
    """A decoder that is not of transformers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv = nn.Embedding(48, 16), nn.Linear(16, 48)

    def forward(self, ids: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(ids)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / 8**0.5).masked_fill(
            ~torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(), -torch.inf
        )
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_hand_written_decoder_is_simulated_and_not_decoded() -> None:
    report = simulate_cake(HandWritten(), tokens(1, 30), cache_size=10, window_size=4)
    assert report.layers[0].kept.shape == (1, 2, 10)
    with pytest.raises(ValueError, match="give a causal language model of transformers"):
        simulate_cake(HandWritten(), tokens(1, 30), cache_size=10, window_size=4, max_new_tokens=1)


def test_refusals_name_the_value_and_the_mend() -> None:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 48,
    }
    with pytest.raises(ValueError, match="both directions"):
        simulate_cake(BertModel(BertConfig(**sizes)), tokens(1, 40), cache_size=10, window_size=4)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    with pytest.raises(ValueError, match="encoder–decoder"):
        simulate_cake(
            t5,
            {"input_ids": tokens(1, 40), "decoder_input_ids": tokens(1, 4)},
            cache_size=10,
            window_size=4,
        )
    model, ids = llama(), tokens(1, 40)
    for changes, words in (
        ({"window_size": 40}, "a window_size below 40"),
        ({"window_size": 1}, "whole number of 2 or more"),
        ({"cache_size": 0}, "cache_size 0"),
        ({"cache_size": 1.5}, r"cache_size 1.5: .*\(0, 1\]"),
        ({"cache_size": True}, "cache_size True"),
        ({"cache_size": 4}, "leaves no room beside window_size 4"),
        ({"tau1": 0.0}, "tau1 0.0: give a finite number above 0"),
        ({"tau2": -1.0}, "tau2"),
        ({"gamma": float("nan")}, "gamma"),
        ({"pool": 4}, "pool 4: give an odd number"),
        ({"allotment": "fill"}, "filled or published"),
        ({"max_new_tokens": -1}, "max_new_tokens -1"),
    ):
        with pytest.raises(ValueError, match=words):
            simulate_cake(model, ids, **({"cache_size": 10, "window_size": 4} | changes))
    with pytest.raises(ValueError, match="did you mean 'snapkv'"):
        simulate_cache(model, ids, policy="snapkw", cache_size=10, window_size=4)


@pytest.mark.parametrize("policy", ["cake", "h2o", "recency", "random"])
def test_decoding_is_what_generate_does_with_the_same_cache(policy: str) -> None:
    model, ids = llama(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    batch, sizes = (
        {"input_ids": ids, "attention_mask": mask},
        {"cache_size": CACHE, "window_size": WINDOW},
    )
    report = simulate_cache(model, batch, policy=policy, max_new_tokens=6, **sizes)
    given = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cascade": False}
    made = compressed_generate(model, ids, attention_mask=mask, policy=policy, **sizes, **given)
    assert torch.equal(report.tokens, made.tokens)
    held = made.cache.kept()
    for layer in report.layers:  # what the record says went, went
        for at, heads in enumerate(layer.kept_at(5)):
            for head, row in enumerate(heads):
                left = [j for j in held[layer.layer][at, head].tolist() if j >= 0]
                assert row.nonzero().flatten().tolist() == left


def test_a_model_that_gives_nan_is_named() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn has NaN attention weights"):
        simulate_cake(model, tokens(1, LENGTH), cache_size=CACHE, window_size=WINDOW)


def test_full_keeps_every_key_and_costs_nothing() -> None:
    model, ids = llama(), tokens(1, LENGTH)
    report = simulate_cache(
        model, ids, policy="full", cache_size=CACHE, window_size=WINDOW, max_new_tokens=4
    )
    assert (report.compression_ratio, report.budget_use, report.eviction_frequency) == (
        1.0,
        1.0,
        0.0,
    )
    assert report.perplexity == pytest.approx(report.full_perplexity, rel=1e-5)


def test_a_short_sample_keeps_everything() -> None:
    model, ids = llama(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, : LENGTH - 14] = 0
    report = simulate_cake(
        model, {"input_ids": ids, "attention_mask": mask}, cache_size=CACHE, window_size=WINDOW
    )
    assert [int((layer.kept[0] >= 0).sum()) for layer in report.layers] == [28] * 3
    assert sum(int((layer.kept[1, 0] >= 0).sum()) for layer in report.layers) == 3 * CACHE
