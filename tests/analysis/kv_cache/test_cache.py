"""A compressed cache gives the logits of a full forward with the evicted keys at -inf, in every way in which it is used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from stabmon.analysis.kv_cache import POLICIES, CompressedCache, compressed_generate
from tests.analysis.kv_cache.models import MAKERS, compressed, gemma3, gpt2, llama, masked_forward, tokens

PROMPT, NEW = 40, 12
SMALL = {"cache_size": 16, "window_size": 6}
WITHIN = 1e-4


def agree(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert (given - expected).abs().max().item() < WITHIN


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["cake", "snapkv"])
@pytest.mark.parametrize("maker", MAKERS)
@torch.no_grad()
def test_one_token_and_many_with_and_without_positions(maker: str, policy: str, attention: str) -> None:
    model, ids = MAKERS[maker](attn_implementation=attention), tokens(2, PROMPT + NEW)
    full = model(ids, use_cache=False).logits[:, PROMPT:]
    for positions in (None, torch.arange(PROMPT + NEW)[None]):
        for step in (1, NEW):
            cache = compressed(model, ids, PROMPT, policy=policy, **SMALL)
            kept = cache.kept()
            sizes = {name: held.shape[-1] for name, held in kept.items()}
            assert all(size < PROMPT for size in sizes.values())
            assert (len(set(sizes.values())) > 1) == (policy == "cake"), "CAKE's layers differ in length"
            made = []
            with cache.attached():
                for at in range(PROMPT, PROMPT + NEW, step):
                    given = {} if positions is None else {"position_ids": positions[:, at : at + step]}
                    made.append(model(ids[:, at : at + step], past_key_values=cache.key_values, **given).logits)
            expected = masked_forward(model, ids, kept, PROMPT)[:, PROMPT:]
            agree(torch.cat(made, 1), expected)
            assert (full - expected).abs().max() > 100 * WITHIN, "what is evicted must show"
