"""The padding of a batch changes no reading."""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5Model,
)

from stabmon import AttentionAnalyzer
from stabmon.operator import attention_operator
from stabmon.signals import SIGNALS
from stabmon.signals.reduce import measure
from tests.support.small_runs import same_readings

LENGTHS, WIDTH = (12, 7), 32
SIZES = {
    "vocab_size": 99,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
TOKENS = torch.randint(1, 99, (2, 12), generator=torch.Generator().manual_seed(3))
PADDINGS = [(0, 0), (0, 5), (0, 40), (9, 0), (4, 6)]


def sharpen(model):
    """Spread queries, so that rows differ."""
    for name, parameter in model.named_parameters():
        if "q" in name and parameter.dim() == 2:
            parameter.data.mul_(15)
    return model.eval()


def padded(left, right):
    """Two rows of 12 and 7 tokens with more padding around; tokens, which of them are real, and
    their positions.
    """
    real = torch.stack([torch.arange(-left, 12 + right) < length for length in LENGTHS])
    real &= torch.arange(-left, 12 + right) >= 0
    tokens = nn.functional.pad(TOKENS, (left, right), value=7)
    return tokens, real.long(), torch.arange(-left, 12 + right).clamp(min=0).expand(2, -1)


def stats(model, call):
    """Every signal of every layer over one forward."""
    with AttentionAnalyzer(model, signals=list(SIGNALS)) as analyzer, torch.no_grad():
        call()
        return analyzer.diagnose().stats


def bert(implementation):
    torch.manual_seed(0)
    model = sharpen(BertModel(BertConfig(**SIZES, attn_implementation=implementation)))
    return model, lambda ids, real, at: model(input_ids=ids, attention_mask=real, position_ids=at)


def llama(implementation):
    torch.manual_seed(0)
    model = sharpen(
        LlamaModel(LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation=implementation))
    )
    return model, lambda ids, real, at: model(input_ids=ids, attention_mask=real, position_ids=at)


def torch_encoder(implementation):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 48, dropout=0.0, batch_first=implementation == "sdpa"
    )
    model, embedding = sharpen(nn.TransformerEncoder(layer, 2)).train(), nn.Embedding(99, WIDTH)

    def call(ids, real, _):
        x = embedding(ids) if implementation == "sdpa" else embedding(ids).transpose(0, 1)
        model(x, src_key_padding_mask=real == 0)

    return model, call


def hand_written(implementation):
    from tests.support.small_runs import Attention

    class Masked(Attention):
        def forward(self, x, attention_mask):
            query, key, value = (
                part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
            )
            if implementation == "sdpa":
                mixed = nn.functional.scaled_dot_product_attention(
                    query, key, value, attention_mask
                )
            else:
                scores = (query @ key.mT * 8**-0.5).masked_fill(~attention_mask, -torch.inf)
                mixed = scores.softmax(-1) @ value
            return self.o(mixed.transpose(1, 2).flatten(-2))

    torch.manual_seed(0)
    model, embedding = sharpen(Masked()), nn.Embedding(99, WIDTH)
    return model, lambda ids, real, _: model(embedding(ids), real.bool()[:, None, None])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [bert, llama, torch_encoder, hand_written])
def test_the_padding_of_a_batch_changes_no_reading(family, implementation):
    model, call = family(implementation)
    plain, *others = (stats(model, lambda: call(*padded(*sides))) for sides in PADDINGS)  # noqa: B023
    assert plain
    for other in others:
        assert same_readings(plain, other, 1e-5)


def t5():
    torch.manual_seed(0)
    model = T5Model(
        T5Config(
            vocab_size=99,
            d_model=WIDTH,
            d_kv=8,
            d_ff=48,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
    )
    return sharpen(model)


def bart():
    torch.manual_seed(0)
    layers = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 4))
    }
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    return sharpen(BartModel(BartConfig(vocab_size=99, d_model=WIDTH, **layers, **sizes)))


@pytest.mark.parametrize("make", [t5, bart])
def test_the_padding_of_an_encoder_changes_no_reading_of_cross_attention_whose_rows_all_count(make):
    model, found = make(), []
    for extra in (0, 7, 30):
        tokens, real, _ = padded(0, extra)
        found.append(
            stats(
                model,
                functools.partial(
                    model, input_ids=tokens, attention_mask=real, decoder_input_ids=TOKENS
                ),
            )
        )
    assert len(found[0]) == 3
    assert all(same_readings(found[0], each, 1e-5) for each in found[1:])


def operator(mask, queries=6, keys=6, **more):
    """Attention of random queries and keys under a mask."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, queries, 4), torch.randn(1, 2, keys, 4)
    return attention_operator(query, key, scale=1.0, mask=mask, engine="blockwise", **more)


def counted(mask, **more):
    return operator(mask, **more).is_counted[0, 0].tolist()


def test_only_a_query_whose_own_key_no_row_sees_is_padding():
    hides_last = torch.tensor([True] * 4 + [False] * 2)
    assert counted(hides_last, is_self=True) == hides_last.tolist()
    assert counted(hides_last, is_causal=True) == hides_last.tolist()
    assert counted(hides_last) == [True] * 6  # it may be cross-attention
    assert counted(torch.where(hides_last, 0.0, -torch.inf), is_self=True) == hides_last.tolist()
    window = torch.ones(6, 6, dtype=torch.bool).tril().triu(-1)
    packed = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool().tril()
    not_itself = ~torch.eye(6, dtype=torch.bool)
    for mask in (window, packed, not_itself):
        assert counted(mask, is_self=True) == [True] * 6
    assert counted(window & hides_last, is_self=True) == hides_last.tolist()


def test_keys_before_the_queries_own_shift_them_and_a_cache_with_room_to_spare_hides_none():
    prefix = torch.tensor([True] * 7 + [False] * 2)
    assert counted(prefix, keys=9, is_self=True) == [True] * 4 + [False] * 2
    cache = torch.ones(6, 9, dtype=torch.bool).tril()
    assert counted(cache, keys=9, is_self=True) == [True] * 6


def test_rows_that_are_drawn_leave_padding_out_as_well():
    mask = torch.tensor([True] * 4 + [False] * 2)
    whole, some = (
        operator(mask, is_self=True),
        operator(mask, is_self=True).rows(torch.tensor([0, 3, 5])),
    )
    assert some.is_counted[0, 0].tolist() == [True, True, False]
    drawn = measure(some, ["attention_entropy"])["attention_entropy"]
    expected = whole.entropy()[0, :, [0, 3]].mean(-1)
    np.testing.assert_allclose(drawn.value, expected, rtol=1e-6)
