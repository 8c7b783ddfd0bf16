"""The rollout of real models against a dense float64 product of their eager maps."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabmon.analysis.record import load_record, save_record
from stabmon.analysis.rollout.api import attention_rollout
from tests.support import rollout_models as models

CASES: dict[str, Callable[[], models.Case]] = {
    "llama": models.llama,
    "mistral window": models.mistral,
    "bert padded": models.bert,
    "gpt2 left padded": models.gpt2,
    "vit": models.vit,
    "t5 decoder": models.t5,
    "t5 encoder": functools.partial(models.t5, "encoder"),
    "bart decoder": models.bart,
    "bart encoder": functools.partial(models.bart, "encoder"),
}


@functools.cache
def case_of(name: str) -> tuple[models.Case, list[Tensor]]:
    case = CASES[name]()
    with torch.no_grad():
        return case, models.maps_of(case, "encoder" if case.stack == "encoder" else "own")


def largest(difference: Tensor, valid: Tensor) -> float:
    return float(difference[valid].abs().max())


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_product(name: str) -> None:
    case, maps = case_of(name)
    rollout = attention_rollout(case.model, case.batch, stack=case.stack)
    assert torch.equal(rollout.valid, case.valid)
    assert largest(rollout.matrix - models.dense_rollout(maps), case.valid) <= 1e-5
    torch.testing.assert_close(
        rollout.matrix.sum(-1), torch.ones_like(rollout.matrix[..., 0]), atol=1e-5, rtol=0
    )
    assert len(rollout.layers) == len(maps)


@pytest.mark.parametrize("fusion", ["max", "min"])
@pytest.mark.parametrize("name", ["llama", "bert padded", "gpt2 left padded"])
def test_fuses_heads_and_normalises_rows(name: str, fusion: Any) -> None:
    case, maps = case_of(name)
    rollout = attention_rollout(case.model, case.batch, head_fusion=fusion)
    assert largest(rollout.matrix - models.dense_rollout(maps, fusion), case.valid) <= 1e-5
    assert largest(rollout.matrix - models.dense_rollout(maps), case.valid) > 1e-3


@pytest.mark.parametrize("residual", [0.0, 0.2])
def test_mixes_by_the_residual(residual: float) -> None:
    case, maps = case_of("gpt2 left padded")
    rollout = attention_rollout(case.model, case.batch, residual=residual)
    assert (
        largest(rollout.matrix - models.dense_rollout(maps, residual=residual), case.valid) <= 1e-5
    )


def test_row_that_sees_nothing_is_the_identity_s() -> None:
    case, _ = case_of("gpt2 left padded")
    matrix = attention_rollout(case.model, case.batch).matrix
    assert torch.equal(matrix[1, :4], torch.eye(11)[:4])


def test_starts_at_a_layer_and_selects_by_pattern() -> None:
    case, maps = case_of("llama")
    late = attention_rollout(case.model, case.batch, start_layer=1)
    assert late.layers == ("model.layers.1.self_attn", "model.layers.2.self_attn")
    assert largest(late.matrix - models.dense_rollout(maps[1:]), case.valid) <= 1e-5
    picked = attention_rollout(case.model, case.batch, attention_layer_pattern=r"layers\.[02]\.")
    assert largest(picked.matrix - models.dense_rollout([maps[0], maps[2]]), case.valid) <= 1e-5


@pytest.mark.parametrize(
    "name", ["llama", "mistral window", "bert padded", "gpt2 left padded", "t5 encoder"]
)
def test_targets_and_sources_are_rows_and_columns(name: str) -> None:
    case, _ = case_of(name)
    whole = attention_rollout(case.model, case.batch, stack=case.stack)
    rows = attention_rollout(case.model, case.batch, stack=case.stack, targets=[-1, -3])
    last = [int(each.nonzero()[-1]) for each in case.valid]
    assert rows.targets is not None
    assert rows.targets[:, 0].tolist() == last
    for index, place in enumerate(rows.targets):
        torch.testing.assert_close(
            rows.matrix[index], whole.matrix[index, place], atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            rows.first_token_share[index], whole.first_token_share[index, place], atol=1e-6, rtol=0
        )
    columns = attention_rollout(case.model, case.batch, stack=case.stack, sources=-2)
    assert columns.sources is not None
    for index, place in enumerate(columns.sources):
        torch.testing.assert_close(
            columns.matrix[index], whole.matrix[index][:, place], atol=1e-6, rtol=0
        )
    torch.testing.assert_close(
        columns.first_token_share, whole.first_token_share, atol=1e-6, rtol=0
    )
    both = attention_rollout(case.model, case.batch, stack=case.stack, sources=-2, targets=-1)
    assert both.matrix.shape == (len(case.valid), 1, 1)
    torch.testing.assert_close(
        both.matrix[:, 0, 0],
        rows.matrix[torch.arange(3), 0, columns.sources[:, 0]],
        atol=1e-6,
        rtol=0,
    )


def test_first_token_share_is_of_the_first_token_that_is_not_padding() -> None:
    case, _ = case_of("gpt2 left padded")
    rollout = attention_rollout(case.model, case.batch)
    assert torch.equal(rollout.first_token_share[0], rollout.matrix[0, :, 0])
    assert torch.equal(rollout.first_token_share[1], rollout.matrix[1, :, 4])


@pytest.mark.parametrize("make", [models.t5, models.bart])
def test_joins_encoder_and_decoder(make: Callable[[], models.Case]) -> None:
    case = make()
    with torch.no_grad():
        maps = [models.maps_of(case, kind) for kind in ("encoder", "own", "cross")]
    dense = models.dense_joined(*maps)
    rollout = attention_rollout(case.model, case.batch, stack="joined")
    assert rollout.matrix.shape == (3, 6, 11)
    assert float((rollout.matrix - dense).abs().max()) <= 1e-5
    rows = attention_rollout(case.model, case.batch, stack="joined", targets=[0, -1])
    torch.testing.assert_close(rows.matrix, rollout.matrix[:, [0, 5]], atol=1e-6, rtol=0)
    columns = attention_rollout(case.model, case.batch, stack="joined", sources=[0, 2])
    torch.testing.assert_close(columns.matrix, rollout.matrix[:, :, [0, 2]], atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_s_own_transformer(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = models.sharpen(nn.Transformer(16, 2, 2, 2, 16, batch_first=batch_first))
    source, target = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    parts = (source, target) if batch_first else (source.transpose(0, 1), target.transpose(0, 1))
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            query, key = args[0], args[1]
            with torch.no_grad():
                _, weights = nn.MultiheadAttention.forward(
                    module, query, key, args[2], average_attn_weights=False
                )
            kept[name] = weights.double()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_hook(keep(name), with_kwargs=True)
    model.train()  # without it the encoder runs in C++ and no hook is called
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    model(*parts)
    encoder, decoder, cross = (
        [kept[f"{side}.layers.{i}.{name}"] for i in (0, 1)]
        for side, name in (
            ("encoder", "self_attn"),
            ("decoder", "self_attn"),
            ("decoder", "multihead_attn"),
        )
    )
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_hooks_with_kwargs.clear()
    for stack, dense in (
        ("encoder", models.dense_rollout(encoder)),
        ("decoder", models.dense_rollout(decoder)),
        ("joined", models.dense_joined(encoder, decoder, cross)),
    ):
        rollout = attention_rollout(model, parts, stack=stack)
        assert float((rollout.matrix - dense).abs().max()) <= 1e-5
    assert model.training


def test_hand_written_attention() -> None:
    torch.manual_seed(0)
    model = models.sharpen(models.TinyGPT())
    rollout = attention_rollout(model, models.ids())
    model(models.ids())
    dense = models.dense_rollout([block.weights for block in model.blocks])  # type: ignore[union-attr, misc]
    assert float((rollout.matrix - dense).abs().max()) <= 1e-5
    assert attention_rollout(model, models.ids(), targets=5).matrix.shape == (3, 1, 11)


@pytest.mark.parametrize("array", [lambda maps: maps, lambda maps: maps.numpy()])
def test_given_maps_of_each_rank(array: Callable[[Tensor], Any]) -> None:
    _, maps = case_of("bert padded")
    dense = models.dense_rollout(maps)
    for given in (
        [array(each.float()) for each in maps],
        [array(each.float().mean(1)) for each in maps],
        [array(maps[0].float()), array(maps[1].float().mean(1)), array(maps[2].float())],
    ):
        assert float((attention_rollout(given).matrix - dense).abs().max()) <= 1e-5
    one = [array(each[0].float().mean(0)) for each in maps]
    assert float((attention_rollout(one).matrix - dense[:1]).abs().max()) <= 1e-5
    heads = [array(maps[0][0].float()), array(maps[1][:1].float()), one[2]]
    assert float((attention_rollout(heads).matrix - dense[:1]).abs().max()) <= 1e-5
    assert float((attention_rollout(one, targets=4).matrix - dense[:1, 4:5]).abs().max()) <= 1e-5
    assert attention_rollout([each.double() for each in maps]).matrix.dtype == torch.float64


def test_half_precision_models_are_rolled_out_in_float32() -> None:
    case, maps = case_of("llama")
    half = models.llama().model.bfloat16()
    rollout = attention_rollout(half, case.batch)
    assert rollout.matrix.dtype == torch.float32
    torch.testing.assert_close(rollout.matrix.sum(-1), torch.ones(3, 11), atol=1e-5, rtol=0)
    assert largest(rollout.matrix - models.dense_rollout(maps), case.valid) < 0.05


def test_leaves_the_model_as_it_was() -> None:
    case = models.gpt2()
    case.model.train()
    case.model.transformer.h[1].eval()  # type: ignore[union-attr, operator, index]
    before = [module.training for module in case.model.modules()]
    state, hooks = (
        torch.get_rng_state(),
        [len(module._forward_hooks) for module in case.model.modules()],
    )
    for options in ({}, {"targets": -1}, {"sources": -1}, {"weighting": "gradient"}):
        attention_rollout(case.model, case.batch, **options)
    assert [module.training for module in case.model.modules()] == before
    assert [len(module._forward_hooks) for module in case.model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_image_grid() -> None:
    case, _ = case_of("vit")
    assert attention_rollout(case.model, case.batch).image_grid == {
        "rows": 4,
        "cols": 4,
        "leading": 1,
    }
    text, _ = case_of("llama")
    assert attention_rollout(text.model, text.batch).image_grid is None


def test_record_holds_what_figures_need(tmp_path: Any) -> None:
    case, _ = case_of("bert padded")
    rollout = attention_rollout(case.model, case.batch, targets=[[0, 1], [0, 2], [0, 3]])
    save_record(rollout.to_record(attribution={"rollout_max": float("nan")}), tmp_path)
    record = load_record(tmp_path, "rollout")
    assert record.values["targets"] == [[0, 1], [0, 2], [0, 3]]
    assert record.values["layers"] == list(rollout.layers)
    assert np.array_equal(record.arrays["matrix"], rollout.matrix.numpy())
    assert np.array_equal(record.arrays["valid"].astype(bool), case.valid.numpy())
    assert np.isnan(record.values["attribution"]["rollout_max"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 11}, "target 11 is out of range"),
        ({"targets": 8}, "target 8 of sample 1 is padding: its tokens are 0 to 6"),
        ({"targets": [[0], [1]]}, "given for 2 samples, and the batch has 3"),
        ({"targets": 0.5}, "targets? 0.5"),
        ({"sources": []}, "give a position"),
        ({"residual": 1.0}, "residual 1.0"),
        ({"start_layer": 3}, "start_layer 3: there are 3 layers"),
        ({"start_layer": -1}, "start_layer -1"),
        ({"head_fusion": "sum"}, "head_fusion 'sum': give mean, max or min"),
        ({"weighting": "lrp"}, "weighting 'lrp'"),
        ({"objective": 1}, "objective is given"),
        ({"stack": "tower"}, "stack 'tower' is none"),
        ({"stack": "joined"}, "needs an encoder and a decoder"),
        (
            {"attention_layer_pattern": "mlp"},
            r"matches none of the layers: bert\.encoder\.layer\.0\.attention\.self",
        ),
    ],
)
def test_refuses_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    case, _ = case_of("bert padded")
    with pytest.raises(ValueError, match=message) as caught:
        attention_rollout(case.model, case.batch, **options)
    assert "\n" not in str(caught.value)


def test_refuses_windows_and_merged_tokens() -> None:
    from transformers import SwinConfig, SwinModel

    swin = SwinModel(
        SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
        )
    )
    with pytest.raises(ValueError, match="windows have no rollout"):
        attention_rollout(swin, {"pixel_values": torch.randn(2, 3, 16, 16)})

    from transformers import SegformerConfig, SegformerModel

    sizes = {
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "num_encoder_blocks": 2,
        "sr_ratios": [4, 1],
    }
    more = {
        "patch_sizes": [3, 3],
        "strides": [2, 2],
        "mlp_ratios": [1, 1],
        "decoder_hidden_size": 8,
    }
    with pytest.raises(ValueError, match="64 queries and 4 keys"):
        attention_rollout(
            SegformerModel(SegformerConfig(**sizes, **more)),
            {"pixel_values": torch.randn(2, 3, 16, 16)},
        )

    class Merging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                [nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2)]
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x)[:, ::2])

    with pytest.raises(ValueError, match="merged or regrouped tokens have no rollout"):
        attention_rollout(Merging(), torch.randn(2, 6, 8))


def test_says_which_of_several_stacks_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes = {**models.SMALL, "num_hidden_layers": 1}
    text, vision = (
        {**sizes, "vocab_size": 100, **models.TOKENS},
        {**sizes, "image_size": 16, "patch_size": 8},
    )
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    batch = {"input_ids": models.ids(2, 7), "pixel_values": torch.randn(3, 3, 16, 16)}
    caplog.set_level(logging.WARNING, "stabmon")
    for _ in range(2):
        assert attention_rollout(model, batch).matrix.shape == (2, 7, 7)
    told = [record.message for record in caplog.records if record.name == "stabmon"]
    assert told == [
        "stabmon: CLIPModel has the stacks vision_model (1 layer), text_model (1 layer): the "
        "rollout is of "
        "text_model, which attends last; "
        "choose another by stack="
    ]
    vision_rollout = attention_rollout(model, batch, stack="vision_model")
    assert (vision_rollout.matrix.shape, vision_rollout.stacks) == (
        (3, 5, 5),
        ("vision_model", "text_model"),
    )
    assert vision_rollout.image_grid == {"rows": 2, "cols": 2, "leading": 1}
    assert attention_rollout(model, batch, stack="text_model").image_grid is None


def test_shared_modules_are_layers_in_order() -> None:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    model = models.sharpen(
        AlbertModel(AlbertConfig(vocab_size=100, embedding_size=16, **models.SMALL))
    )
    case = models.Case(model, {"input_ids": models.ids()}, torch.ones(3, 11, dtype=torch.bool))
    rollout = attention_rollout(model, case.batch)
    assert [name.split("#")[1:] for name in rollout.layers] == [[], ["1"], ["2"]]
    output, _ = models.eager(case)
    dense = models.dense_rollout(list(output.attentions))
    assert float((rollout.matrix - dense).abs().max()) <= 1e-5


def test_sinks_leave_rows_that_sum_to_one() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=100,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        **models.SMALL,
        **models.TOKENS,
    )
    case = models.Case(
        GptOssForCausalLM(config).eval(),
        {"input_ids": models.ids()},
        torch.ones(3, 11, dtype=torch.bool),
    )
    eager = copy.deepcopy(case.model)
    eager.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        maps = list(eager(**case.batch, output_attentions=True, use_cache=False).attentions)
    assert float(maps[0].sum(-1).amax()) < 0.99
    rollout = attention_rollout(case.model, case.batch)
    assert float((rollout.matrix - models.dense_rollout(maps)).abs().max()) <= 1e-5
