"""A compressed cache gives the logits of a full forward with the evicted keys at -inf, in every way
in which it is used.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from stabmon.analysis.kv_cache import POLICIES, CompressedCache, compressed_generate, simulate_cake
from tests.support.cache_models import (
    MAKERS,
    SIZES,
    TOKENS,
    VOCABULARY,
    compressed,
    gemma3,
    llama,
    masked_forward,
    sharpened,
    tokens,
)

PROMPT, NEW = 40, 12
SMALL = {"cache_size": 16, "window_size": 6}
WITHIN = 1e-4


def agree(given: torch.Tensor, expected: torch.Tensor) -> None:
    assert (given - expected).abs().max().item() < WITHIN


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["cake", "snapkv"])
@pytest.mark.parametrize("maker", MAKERS)
@torch.no_grad()
def test_one_token_and_many_with_and_without_positions(
    maker: str, policy: str, attention: str
) -> None:
    model, ids = MAKERS[maker](attn_implementation=attention), tokens(2, PROMPT + NEW)
    full = model(ids, use_cache=False).logits[:, PROMPT:]
    for positions in (None, torch.arange(PROMPT + NEW)[None]):
        for step in (1, NEW):
            cache = compressed(model, ids, PROMPT, policy=policy, **SMALL)
            kept = cache.kept()
            sizes = {name: held.shape[-1] for name, held in kept.items()}
            assert all(size < PROMPT for size in sizes.values())
            assert (len(set(sizes.values())) > 1) == (policy == "cake"), (
                "CAKE's layers differ in length"
            )
            made = []
            with cache.attached():
                for at in range(PROMPT, PROMPT + NEW, step):
                    given = (
                        {} if positions is None else {"position_ids": positions[:, at : at + step]}
                    )
                    made.append(
                        model(
                            ids[:, at : at + step], past_key_values=cache.key_values, **given
                        ).logits
                    )
            expected = masked_forward(model, ids, kept, PROMPT)[:, PROMPT:]
            agree(torch.cat(made, 1), expected)
            assert (full - expected).abs().max() > 100 * WITHIN, "what is evicted must show"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_generate_goes_on_from_a_compressed_prompt(attention: str) -> None:
    model, ids = llama(attn_implementation=attention), tokens(2, PROMPT)
    cache = compressed(model, ids, PROMPT - 1, **SMALL)
    with (
        cache.attached()
    ):  # all ids again: generate must feed the last one only, at its own position
        made = model.generate(
            ids,
            past_key_values=cache.key_values,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = masked_forward(model, made.sequences, kept_of_prompt(cache, PROMPT - 1), PROMPT - 1)[
        :, PROMPT - 1 : -1
    ]
    agree(torch.stack(made.logits, 1), expected)


def kept_of_prompt(cache: CompressedCache, prompt: int) -> dict[str, torch.Tensor]:
    return {name: held.masked_fill(held >= prompt, -1) for name, held in cache.kept().items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["cake", "ada_snapkv", "h2o"])
@torch.no_grad()
def test_left_padded_batch(policy: str, attention: str) -> None:
    model, ids = llama(attn_implementation=attention), tokens(3, PROMPT + NEW)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[1, : PROMPT - 12] = 0  # shorter than the cache
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for step in (1, NEW):
        cache = compressed(model, ids, PROMPT, mask, policy=policy, **SMALL)
        kept = cache.kept()
        assert all(int((held[1] >= 0).sum()) == 2 * 12 for held in kept.values())
        made = []
        with cache.attached():
            for at in range(PROMPT, PROMPT + NEW, step):
                part = slice(at, at + step)
                given = {"attention_mask": mask[:, : at + step], "position_ids": positions[:, part]}
                made.append(model(ids[:, part], past_key_values=cache.key_values, **given).logits)
        agree(torch.cat(made, 1), masked_forward(model, ids, kept, PROMPT, mask)[:, PROMPT:])
        for sample, start in ((0, 9), (2, 0)):  # and each sample keeps what it keeps alone
            alone = compressed(
                model, ids[sample : sample + 1, start:], PROMPT - start, policy=policy, **SMALL
            ).kept()
            for name, held in alone.items():
                assert [[j + start for j in row if j >= 0] for row in held[0].tolist()] == [
                    [j for j in row if j >= 0] for row in kept[name][sample].tolist()
                ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_sliding_layers_are_left_out_and_counted(attention: str) -> None:
    model, ids = gemma3(attn_implementation=attention), tokens(2, PROMPT + NEW)
    for step in (1, NEW):
        cache = compressed(model, ids, PROMPT, **SMALL)
        assert cache.left_out == {0: "a sliding window of 8 keys", 2: "a sliding window of 8 keys"}
        kept = cache.kept()
        assert list(kept) == ["model.layers.1.self_attn", "model.layers.3.self_attn"]
        with cache.attached():
            made = [
                model(ids[:, at : at + step], past_key_values=cache.key_values).logits
                for at in range(PROMPT, PROMPT + NEW, step)
            ]
        agree(torch.cat(made, 1), masked_forward(model, ids, kept, PROMPT)[:, PROMPT:])


@torch.no_grad()
def test_prompt_is_compressed_layer_by_layer_and_the_peak_is_one_full_layer() -> None:
    model, ids = llama(), tokens(1, PROMPT)
    one = 2 * 2 * 8 * 4  # keys and values of 2 heads of 8 in float32
    for cascade in (True, False):
        cache = compressed(model, ids, PROMPT, cascade=cascade, **SMALL)
        assert len(cache.stages) == 3
        peak = max(stage.bytes_before for stage in cache.stages)
        assert peak <= (16 * 3 + PROMPT) * one if cascade else peak == 3 * PROMPT * one
        assert cache.held_bytes() <= 16 * 3 * one
        assert sum(held.shape[-1] for held in cache.kept().values()) in range(
            16 * 3 - 3, 16 * 3 + 1
        )


@pytest.mark.parametrize("policy", sorted(POLICIES))
@torch.no_grad()
def test_generate_in_one_call_evicts_as_a_masked_forward_would(policy: str) -> None:
    """Every step's logits equal a full forward in which each query misses the keys evicted before
    it.
    """
    model, ids = llama(), tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    made = compressed_generate(
        model,
        ids,
        attention_mask=mask,
        policy=policy,
        max_new_tokens=7,
        do_sample=False,
        min_new_tokens=7,
        **SMALL,
    )
    cache = made.cache
    assert made.tokens.shape == (2, 7)
    assert torch.equal(made.sequences[:, :PROMPT], ids)
    for held in cache.kept().values():
        assert bool((held[..., 1:] >= held[..., :-1]).all()), "positions ascend"
    limits = {name: (held >= 0).sum(-1).amax() for name, held in cache.kept().items()}
    if policy == "full":
        assert not [each for each in cache.evictions if each.positions.max() >= 5]
    elif cache.policy.evicts_in_decode:
        assert {each.step for each in cache.evictions} == set(range(7))
        assert sum(int(each) for each in limits.values()) <= 3 * 16 + 3
    else:
        assert {each.step for each in cache.evictions} == {0}
    expected = stepwise(model, made.sequences, mask, cache)
    assert torch.equal(expected.argmax(-1), made.tokens)


def stepwise(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: CompressedCache
) -> torch.Tensor:
    """Logits ``[B, T, V]`` by one masked forward for each new token, keys at -inf from the step on
    at which they went.
    """
    new = ids.shape[1] - PROMPT
    found = []
    mask = torch.nn.functional.pad(mask, (0, new), value=1)
    for step in range(new):
        length = PROMPT + step
        kept = {}
        for name, held in cache.kept().items():
            gone = torch.zeros(*held.shape[:2], length + 1, dtype=torch.bool)
            for each in cache.evictions:
                if each.layer == name and each.step < step:
                    lost = torch.from_numpy(each.positions)
                    gone.scatter_(-1, torch.where(lost < 0, length, lost), True)
            kept[name] = (
                torch.arange(length).expand(*held.shape[:2], -1).masked_fill(gone[..., :length], -1)
            )
        found.append(earlier_forward(model, ids[:, :length], mask[:, :length], cache, step, kept))
    return torch.stack(found, 1)


def earlier_forward(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: CompressedCache,
    step: int,
    kept: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The last token's logits, where each query of an earlier step missed what was gone by then."""
    from stabmon.capture.intercept import AttentionSite, intercepted

    length = ids.shape[1]
    place = torch.arange(length)

    def around(site: AttentionSite) -> Any:
        visible = (
            ((place[None] <= place[:, None]) & mask[:, None, None].bool())
            .expand(-1, 2, -1, -1)
            .clone()
        )
        for each in cache.evictions:
            if each.layer == site.layer and each.step < step:
                for sample, heads in enumerate(each.positions):
                    for head, row in enumerate(heads):
                        visible[
                            sample,
                            head,
                            PROMPT + each.step :,
                            [j for j in row.tolist() if 0 <= j < length],
                        ] = False
        bias = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
        bias[..., place, place] = 0.0
        return site.run(attention_mask=bias.repeat_interleave(2, dim=1))

    with intercepted(model, around):
        return model(
            ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).logits[:, -1]


@pytest.mark.parametrize("maker", MAKERS)
@torch.no_grad()
def test_model_and_library_are_left_as_they_were(maker: str) -> None:
    from transformers.modeling_utils import AttentionInterface

    model, ids = MAKERS[maker](), tokens(2, PROMPT)
    model.train()
    model.lm_head.eval()
    flags = [module.training for module in model.modules()]
    config, lookup = copy.deepcopy(model.config.to_dict()), AttentionInterface.get_interface
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = model(ids, use_cache=False).logits
    compressed_generate(model, ids, max_new_tokens=4, do_sample=False, **SMALL)
    with pytest.raises(ValueError, match="max_new_tokens"):
        compressed_generate(model, ids, max_new_tokens=-4, **SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [module.training for module in model.modules()] == flags
    assert model.config.to_dict() == config
    assert AttentionInterface.get_interface is lookup
    assert [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ] == hooks
    torch.manual_seed(0)
    assert torch.equal(model(ids, use_cache=False).logits, first), "bit for bit"


@torch.no_grad()
def test_wrong_use_is_refused() -> None:
    model, ids = llama(), tokens(1, PROMPT)
    cache = compressed(model, ids, PROMPT, **SMALL)
    with pytest.raises(RuntimeError, match=r"with cache.attached\(\)"):
        model(ids[:, :1], past_key_values=cache.key_values)
    with pytest.raises(ValueError, match="pad on the left"):
        compressed_generate(model, ids, attention_mask=torch.arange(PROMPT)[None] < 30, **SMALL)
    with pytest.raises(ValueError, match="whole sequence"), cache.attached():
        model(ids[:, :2], attention_mask=torch.ones(1, 1, 2, 2), past_key_values=cache.key_values)


def hybrid() -> Any:
    """Attention in every second layer, a state in the others."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(4)
    states = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    kinds = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
    return sharpened(
        Qwen3NextForCausalLM(Qwen3NextConfig(**(SIZES | TOKENS | states | experts | kinds)))
    )


def latent() -> Any:
    """One latent for all heads in the cache, and values of another size than keys."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(5)
    ranks = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "head_dim": 4,
    }
    experts = {
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
    }
    few = {"num_hidden_layers": 2, "num_key_value_heads": 4}
    return sharpened(
        DeepseekV3ForCausalLM(DeepseekV3Config(**(SIZES | TOKENS | ranks | experts | few)))
    )


def shared() -> Any:
    """The last two layers read the keys of the two before them."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.manual_seed(6)
    own = {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
    }
    more = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 8}
    kinds = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [32] * 4,
    }
    sparse = {"activation_sparsity_pattern": [0.0] * 4}
    return sharpened(
        Gemma3nForCausalLM(Gemma3nTextConfig(**(SIZES | TOKENS | own | more | kinds | sparse)))
    )


@pytest.mark.parametrize(
    ("maker", "left_out"),
    [
        (hybrid, {0: "a state instead of keys", 2: "a state instead of keys"}),
        (latent, {}),
        (
            shared,
            {0: "a sliding window of 8 keys", 2: "another layer's keys", 3: "another layer's keys"},
        ),
    ],
)
@torch.no_grad()
def test_caches_of_other_kinds(maker: Any, left_out: dict[int, str]) -> None:
    model, ids = maker(), tokens(2, PROMPT + NEW)
    for step in (1, NEW):
        cache = compressed(model, ids, PROMPT, **SMALL)
        assert cache.left_out == left_out
        kept = cache.kept()
        if maker is shared:
            kept["model.layers.3.self_attn"] = kept["model.layers.1.self_attn"]
        with cache.attached():
            made = [
                model(ids[:, at : at + step], past_key_values=cache.key_values).logits
                for at in range(PROMPT, PROMPT + NEW, step)
            ]
        expected = masked_forward(model, ids, kept, PROMPT)[:, PROMPT:]
        agree(torch.cat(made, 1), expected)
        assert (
            model(ids, use_cache=False).logits[:, PROMPT:] - expected
        ).abs().max() > 100 * WITHIN
    report = simulate_cake(model, ids, max_new_tokens=3, **SMALL)
    assert len(report.left_out) >= len(left_out) - (maker is shared)
    assert report.layers[0].kept.shape[1] == cache.layers[min(cache.layers)].keys.shape[1]


@torch.no_grad()
def test_attention_that_cannot_be_told_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM

    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2)
    ).eval()
    with pytest.raises(
        ValueError, match=r"layer 0 of BloomForCausalLM .* attn_implementation='sdpa'"
    ):
        compressed_generate(bloom, tokens(1, PROMPT), **SMALL)
    mistral = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()
    with pytest.raises(ValueError, match="a sliding window of 8 keys"):
        compressed_generate(mistral, tokens(1, PROMPT), **SMALL)


@torch.no_grad()
def test_beam_search_carries_positions_with_the_beams() -> None:
    model, ids = llama(), tokens(2, PROMPT)
    made = compressed_generate(model, ids, num_beams=3, max_new_tokens=5, do_sample=False, **SMALL)
    full = compressed_generate(
        model, ids, policy="full", num_beams=3, max_new_tokens=5, do_sample=False, **SMALL
    )
    stock = model.generate(ids, num_beams=3, max_new_tokens=5, do_sample=False)
    assert torch.equal(full.sequences, stock)
    assert made.sequences.shape == stock.shape
    for layer in made.cache.layers.values():
        assert layer.keys.shape[0] == layer.positions.shape[0] == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    model, ids = llama(), tokens(1, PROMPT)
    report = simulate_cake(model.to(dtype), ids, max_new_tokens=3, **SMALL)
    assert report.layers[0].scores.dtype == torch.float32
    assert report.log_probabilities.dtype == torch.float32
    assert not report.layers[0].scores[..., : PROMPT - 6].isnan().any()


@torch.no_grad()
def test_a_prompt_shorter_than_the_window_generates_as_ever() -> None:
    model = llama()
    for length, policy in itertools.product((1, 4), sorted(POLICIES)):
        ids = tokens(1, length)
        for size in (16, 1.0) if policy == "cake" else (16,):
            given = {"policy": policy, "cache_size": size, "window_size": 6}
            made = compressed_generate(model, ids, max_new_tokens=5, do_sample=False, **given)
            if size == 16:
                assert torch.equal(
                    made.sequences, model.generate(ids, max_new_tokens=5, do_sample=False)
                )
            assert made.tokens.shape == (1, 5)
