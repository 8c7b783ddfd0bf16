"""Models of transformers with detours between scores and softmax, each seen exactly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stabmon.capture import AttentionCapture
from stabmon.operator.from_call import operator_of
from tests.support.attention_zoo import BERT_SIZES, VOCABULARY, noise, seeded, tokens
from tests.support.probability_oracle import probabilities

BERT = BERT_SIZES | {"attn_implementation": "eager"}
SEGGPT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": [32, 16],
    "patch_size": 4,
    "pretrain_image_size": 16,
    "mlp_dim": 64,
    "intermediate_hidden_state_indices": [1],
    "merge_index": 0,
    "decoder_hidden_size": 16,
}
HIERA: dict[str, Any] = {
    "image_size": [32, 32],
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "masked_unit_size": [4, 4],
}
SAM2: dict[str, Any] = {
    "hidden_size": 12,
    "image_size": 64,
    "patch_kernel_size": 7,
    "patch_stride": 4,
    "patch_padding": 3,
    "blocks_per_stage": [1, 1],
    "embed_dim_per_stage": [12, 24],
    "num_attention_heads_per_stage": [1, 2],
    "global_attention_blocks": [],
    "query_stride": [2, 2],
    "attn_implementation": "eager",
    "num_query_pool_stages": 1,
    "window_size_per_stage": [8, 4],
    "backbone_channel_list": [24, 12],
}
SWIN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2],
    "num_heads": [2],
    "window_size": 4,
}
GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "attn_pdrop": 0.0,
}
IMAGES = noise(1, 3, 16, 16)

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[int]]] = {
    "BigBird": (
        lambda: T.BigBirdModel(T.BigBirdConfig(**BERT | {"block_size": 4})),
        tokens(64, padding=3),
        [4] * 10,
    ),
    "Luke": (
        lambda: T.LukeModel(T.LukeConfig(entity_vocab_size=10, **BERT)),
        tokens(9)
        | {
            "entity_ids": torch.ones(2, 3).long(),
            "entity_position_ids": torch.zeros(2, 3, 4).long(),
        },
        [4] * 2,
    ),
    "Longformer": (
        lambda: T.LongformerModel(T.LongformerConfig(**BERT | {"attention_window": [4, 4]})),
        tokens(16, padding=3) | {"global_attention_mask": torch.eye(16)[:2].long()},
        [4] * 4,
    ),
    "SegGPT": (
        lambda: T.SegGptModel(T.SegGptConfig(**SEGGPT)),
        {"pixel_values": IMAGES, "prompt_pixel_values": IMAGES, "prompt_masks": IMAGES},
        [4] * 2,
    ),
    "Hiera": (
        lambda: T.HieraModel(T.HieraConfig(**HIERA, num_query_pool=1)),
        {"pixel_values": noise(2, 3, 32, 32)},
        [1, 2],
    ),
    "SAM 2": (
        lambda: T.Sam2HieraDetModel(T.Sam2HieraDetConfig(**SAM2)),
        {"pixel_values": noise(1, 3, 64, 64)},
        [1, 2],
    ),
    "Swin v2": (
        lambda: T.Swinv2Model(T.Swinv2Config(**SWIN, drop_path_rate=0.0)),
        {"pixel_values": noise(2, 3, 16, 16)},
        [2] * 2,
    ),
    "OpenAI GPT": (
        lambda: T.OpenAIGPTModel(T.OpenAIGPTConfig(**GPT, resid_pdrop=0.0)),
        tokens(20, padding=3),
        [4] * 2,
    ),
}


class Softmaxes(TorchDispatchMode):
    """Dispatch mode that keeps the results of all softmaxes, as the kernels return them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.found.append(result.detach())
        return result


def entropies(p: Tensor) -> Tensor:
    """Return the entropies of all rows, sorted."""
    return torch.special.entr(p.double()).sum(-1).flatten().sort().values


@pytest.mark.parametrize("name", MODELS)
def test_every_softmax_that_is_used_is_seen_exactly(name: str) -> None:
    build, inputs, heads = MODELS[name]
    model = seeded(build)
    seen: list[tuple[int, Tensor]] = []
    errors: list[Exception] = []
    with (
        Softmaxes() as made,
        AttentionCapture(
            model,
            lambda call: seen.append((operator_of(call).heads, probabilities(call))),
            on_error=errors.append,
        ),
    ):
        model(**inputs)
    assert errors == []
    assert [count for count, _ in seen] == heads
    left = [entropies(p) for p in made.found]
    for _, p in seen:
        rows = entropies(p[~p.isnan().any(-1)])  # without rows that see no key
        close = [
            bool(
                (each[torch.searchsorted(each, rows - 1e-5).clamp(max=len(each) - 1)] - rows)
                .abs()
                .max()
                < 2e-5
            )
            for each in left
        ]
        del left[close.index(True)]


def test_the_causal_mask_of_a_multiplied_and_shifted_score_is_known() -> None:
    build, inputs, _ = MODELS["OpenAI GPT"]
    counts: list[Tensor] = []
    model = seeded(build)
    with AttentionCapture(model, lambda call: counts.append(operator_of(call).n_visible())):
        model(input_ids=inputs["input_ids"])
    for count in counts:
        assert torch.equal(count.expand(2, 4, 20), torch.arange(1, 21).expand(2, 4, 20))
