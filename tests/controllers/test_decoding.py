"""A key's bias is remembered with the key: decoding from a cache gives what one forward over
everything gives.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from stabmon.controllers import attach_controllers
from tests.controllers.test_families import CASES as ALL
from tests.support.attention_zoo import tokens, zoo
from tests.support.controlled_attention import built, output_of

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("info_density", {"form": "both"}),
    "linear_ramp": ("linear_ramp", {}),
}
FAMILIES = (
    "gpt2-sdpa",
    "gpt2-eager",
    "llama-sdpa",
    "llama-eager",
    "mistral-sdpa",
    "gemma3-sdpa",
    "deepseek_v3-sdpa",
    "opt-sdpa",
)


def in_pieces(model: Any, ids: Tensor, cache: Any, pieces: tuple[int, ...]) -> Tensor:
    """Logits of ``ids`` given piece by piece."""
    return torch.cat(
        [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in ids.split(pieces, 1)
        ],
        dim=1,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_with_a_cache_is_the_full_forward(family: str, case: str) -> None:
    kind, options = CASES[case]
    model, _, _ = built(family, kind, **options)
    ids = tokens(14)["input_ids"]
    full = model(input_ids=ids).logits
    found = in_pieces(model, ids, DynamicCache(config=model.config), (5, 1, 1, 3, 1, 1, 1, 1))
    torch.testing.assert_close(found, full, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_static_cache_even_one_laid_out_ahead(implementation: str) -> None:
    model, _, _ = built(f"llama-{implementation}", form="both")
    ids = tokens(10)["input_ids"]
    full = model(input_ids=ids).logits
    for ahead in (False, True):
        cache = StaticCache(config=model.config, max_cache_len=16)
        if ahead:
            cache.early_initialization(
                batch_size=2,
                num_heads=2,
                head_dim=8,
                dtype=torch.float32,
                device=torch.device("cpu"),
            )
        torch.testing.assert_close(
            in_pieces(model, ids, cache, (4, 1, 1, 4)), full, atol=2e-4, rtol=1e-4
        )


@torch.no_grad()
def test_a_cropped_cache_forgets_the_biases_of_what_was_cropped() -> None:
    model, _, _ = built("llama-sdpa", form="key_bias")
    ids, other = tokens(10)["input_ids"], tokens(10, seed=7)["input_ids"]
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.cat((ids[:, :6], other[:, :3]), 1), past_key_values=cache)
    cache.crop(-3)
    found = model(input_ids=ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(input_ids=ids).logits[:, 6:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama-sdpa", "gpt2-sdpa", "mistral-eager"])
@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generate_chooses_the_same_with_and_without_a_cache(family: str, beams: int) -> None:
    model, _, _ = built(family, form="both")
    inputs = tokens(6, padding=2, side="left")
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    with_cache = model.generate(**inputs, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(**inputs, use_cache=False, **options))


@torch.no_grad()
def test_an_encoder_decoder_generates_the_same_with_and_without_a_cache() -> None:
    model, inputs, _ = built("t5-sdpa", form="key_bias")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(**given, use_cache=True, **options),
        model.generate(**given, use_cache=False, **options),
    )


@torch.no_grad()
def test_a_cache_filled_before_the_controllers_came_is_refused() -> None:
    model, _ = zoo()["llama-sdpa"]()
    cache = DynamicCache(config=model.config)
    model.eval()(**tokens(5), past_key_values=cache, use_cache=True)
    attach_controllers(model, "info_density")
    with pytest.raises(ValueError, match="start with a new one"):
        model(**tokens(3), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("family", ["llama-sdpa", "mistral-eager"])
@torch.no_grad()
def test_the_last_token_changes_no_earlier_logit(family: str, case: str) -> None:
    kind, options = ALL[case]
    model, _, _ = built(family, kind, **options)
    ids = tokens(14)["input_ids"]
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 17) % 60 + 3
    before, after = output_of(model, {"input_ids": ids}), output_of(model, {"input_ids": changed})
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
