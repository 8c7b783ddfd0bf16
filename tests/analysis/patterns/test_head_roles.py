"""Head roles of a stock GPT-2 whose weights are written by hand, so that every head's is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from stabmon.analysis.patterns.api import AttentionPatterns, attention_patterns

TOKENS, LENGTH, HEADS, WIDTH, HEAD = 16, 48, 2, 96, 48
"""A token's vector: 16 places for its identity, 16 for that of the token before, 48 for where."""
TOKEN, BEFORE, PLACE = slice(0, 16), slice(16, 32), slice(32, 80)
STRONG = 30.0

NOISE = torch.randn(48, 48, generator=torch.Generator().manual_seed(0)) * 0.3

Head = tuple[Tensor, Tensor]
"""W_q and W_k, ``[96, 48]``: the score of (i, j) is x_i W_q · x_j W_k."""


def empty() -> Head:
    return torch.zeros(WIDTH, HEAD), torch.zeros(WIDTH, HEAD)


def by_place(score: Tensor) -> Head:
    """Scores ``[48, 48]`` of query and key positions."""
    query, key = empty()
    query[PLACE], key[PLACE] = score, torch.eye(HEAD)
    return query, key


def by_offset(*offsets: int, score: float = STRONG) -> Head:
    return by_place(sum(score * torch.eye(LENGTH).roll(-k, 1).tril() for k in offsets))


def at_first(score: float = STRONG) -> Head:
    scores = torch.zeros(LENGTH, LENGTH)
    scores[:, 0] = score
    return by_place(scores)


def by_token(of_key: slice, score: float = STRONG) -> Head:
    query, key = empty()
    query[TOKEN, :16], key[of_key, :16] = score * torch.eye(16), torch.eye(16)
    return query, key


def both(one: Head, other: Head) -> Head:
    """The sum of two heads' scores; they use up to 48 and 16 features, so places are folded."""
    query, key = empty()
    scores = one[0][PLACE] @ one[1][PLACE].T
    left, values, right = torch.linalg.svd(scores)
    assert values[32:].max() < 1e-4
    query[PLACE, 16:], key[PLACE, 16:] = left[:, :32] * values[:32], right[:32].T
    query[:, :16], key[:, :16] = other[0][:, :16], other[1][:, :16]
    return query, key


def with_mass(offset: int | None, mass: float) -> Head:
    """The key ``offset`` back, or the first, has this mass and the others share the rest alike."""
    scores = torch.zeros(LENGTH, LENGTH)
    for i in range(1, LENGTH):
        j = 0 if offset is None else i - offset
        if j >= 0:
            scores[i, j] = np.log(mass / (1 - mass) * i)
    return by_place(scores)


def shared(one: Head, other: Head) -> Head:
    """The sum of two heads' scores by place."""
    return by_place(sum(head[0][PLACE] @ head[1][PLACE].T for head in (one, other)))


def decay(rate: float) -> Head:
    place = torch.arange(LENGTH)
    return by_place(-rate * (place[:, None] - place).clamp(min=0).float())


def without_self(head: Head) -> Head:
    """The head with a penalty on its own position."""
    query, key = empty()
    angle = 2 * torch.pi * torch.arange(LENGTH)[:, None] * torch.arange(16) / LENGTH
    wave = torch.cat([angle.cos(), angle.sin()], 1) / 16  # nearly one-hot in 32 features
    query[PLACE, 16:], key[PLACE, 16:] = -40 * wave * 16, wave
    query[:, :16], key[:, :16] = head[0][:, :16], head[1][:, :16]
    return query, key


HEADS_BY_LAYER: list[tuple[tuple[Head, set[str]], tuple[Head, set[str]]]] = [
    ((by_offset(1), {"previous_token"}), (at_first(), {"sink"})),
    ((by_token(BEFORE), {"induction"}), (by_token(TOKEN), {"duplicate_token"})),
    ((by_offset(2), {"offset_2"}), (by_offset(0), {"self"})),
    ((by_offset(0, 1, 2, 3), {"local"}), (decay(0.5), {"local"})),
    ((empty(), {"uniform"}), (by_place(NOISE), {"uniform"})),
    ((with_mass(None, 0.35), {"sink"}), (with_mass(None, 0.2), {"mixed"})),
    ((with_mass(1, 0.6), {"previous_token"}), (with_mass(1, 0.4), {"mixed"})),
    ((both(at_first(), by_token(BEFORE)), {"mixed"}), (by_offset(5), {"offset_5"})),
    ((by_offset(0, 1), {"mixed"}), (by_token(BEFORE, score=2.2), {"mixed"})),
    ((shared(at_first(), by_offset(1)), {"mixed"}), (shared(at_first(), by_offset(0)), {"mixed"})),
    ((both(at_first(9), by_token(BEFORE)), {"induction"}), (decay(1.0), {"self", "local"})),
    ((by_offset(1, 2), {"local"}), (by_offset(1, 20), {"mixed"})),
    ((without_self(by_token(TOKEN)), {"duplicate_token"}), (by_offset(20), {"twenty"})),
]


def model(layers: Any = HEADS_BY_LAYER) -> GPT2LMHeadModel:
    """Layer 0 copies the token before into the residual stream; nothing else writes to it."""
    sizes = {"vocab_size": TOKENS, "n_embd": WIDTH, "n_positions": LENGTH, "n_head": HEADS}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, n_layer=len(layers), n_inner=4)).eval()
    with torch.no_grad():
        for weight in gpt2.parameters():
            weight.zero_()
        gpt2.transformer.wte.weight[:, TOKEN] = torch.eye(16)
        gpt2.transformer.wpe.weight[:, PLACE] = torch.eye(48)
        for index, (block, heads) in enumerate(zip(gpt2.transformer.h, layers, strict=True)):
            ones = 2 if index == 0 else 3
            mean = ones / WIDTH
            block.ln_1.weight[:], block.ln_1.bias[:] = (mean - mean**2) ** 0.5, mean
            for number, (head, _) in enumerate(heads):
                start = number * HEAD
                block.attn.c_attn.weight[:, start : start + HEAD] = head[0] * HEAD**0.5
                block.attn.c_attn.weight[:, WIDTH + start : WIDTH + start + HEAD] = head[1]
        first = gpt2.transformer.h[0].attn
        first.c_attn.weight[TOKEN, 2 * WIDTH : 2 * WIDTH + 16] = torch.eye(16)
        first.c_proj.weight[:16, BEFORE] = torch.eye(16)
    return gpt2


def text(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, TOKENS, (3, length), generator=torch.Generator().manual_seed(seed))


def look(ids: Tensor, layers: Any = HEADS_BY_LAYER, **options: Any) -> AttentionPatterns:
    batch = {"input_ids": ids} | options.pop("more", {})
    roles = {"twenty": 20}
    return attention_patterns(
        model(layers), batch, advice=False, similarity=False, custom_roles=roles, **options
    )


@pytest.mark.parametrize("seed", range(3))
def test_every_head_is_named_as_it_was_made(seed: int) -> None:
    found = look(text(seed=seed))
    for layer, heads in zip(found.layers, HEADS_BY_LAYER, strict=True):
        for head, (_, expected) in enumerate(heads):
            assert set(found.roles_of(layer, head)) == expected, (layer, head)


TEXTS = {
    "period 2": torch.arange(LENGTH)[None] % 2,
    "one token": torch.zeros(1, LENGTH, dtype=torch.int64),
    "runs": torch.arange(LENGTH)[None] // 3,
    "a block twice": torch.cat([text(24, 5)[:1] % 12] * 2, 1),
    "two tokens": text(seed=7) % 2,
    "period 16": torch.arange(LENGTH)[None] % 16,
}


BY_TOKEN = {(1, 0), (1, 1), (7, 0), (8, 1), (10, 0), (12, 0)}
"""Heads whose scores depend on tokens; where one token follows itself they look like others."""


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_makes_a_head_look_like_another_kind(name: str) -> None:
    found = look(TEXTS[name])
    for index, (layer, heads) in enumerate(zip(found.layers, HEADS_BY_LAYER, strict=True)):
        for head, (_, expected) in enumerate(heads):
            named = set(found.roles_of(layer, head))
            if (index, head) not in BY_TOKEN:
                assert named == expected, (layer, head)
            elif name in ("a block twice", "period 16"):
                assert named <= expected | {"mixed", "uniform"}, (layer, head)
            else:
                assert "previous_token" not in named


def test_without_repeats_induction_is_not_testable_and_said_so() -> None:
    found = look(torch.randperm(16, generator=torch.Generator().manual_seed(0))[None])
    layer = found.layers[1]
    assert found.roles_of(layer, 0) == ["uniform"]
    evidence = next(role.evidence for role in found.roles if role.layer == layer)
    assert "no token comes again" in evidence["not_testable"]["induction"]
    assert evidence["least_visible"] == 8
    assert found.roles_of(found.layers[0], 0) == ["previous_token"]
    assert found.roles_of(found.layers[0], 1) == ["sink"]


@pytest.mark.parametrize("length", [12, 16, 24])
def test_a_short_text_still_shows_what_is_plain(length: int) -> None:
    found = look(text(length))
    plain = {"previous_token", "sink", "self", "uniform", "offset_2"}
    for layer, heads in zip(found.layers[:7], HEADS_BY_LAYER, strict=False):
        for head, (_, expected) in enumerate(heads):
            if expected <= plain:
                assert set(found.roles_of(layer, head)) == expected, (layer, head)
    short = look(text(6)[:, :3])
    assert not short.roles
    assert any("no head roles" in note for note in short.notes)


def test_left_padding_hides_no_role() -> None:
    ids, pad = text()[:, :40], torch.zeros(3, 8, dtype=torch.int64)
    mask = torch.cat([pad, torch.ones_like(ids)], 1)
    more = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    padded = look(torch.cat([pad, ids], 1), more=more)
    plain = look(ids)
    for one, other in zip(plain.roles, padded.roles, strict=True):
        assert (one.layer, one.head, one.role) == (other.layer, other.head, other.role)
        assert one.evidence["mass"] == pytest.approx(other.evidence["mass"], abs=1e-5)
        assert one.evidence["all_rows"] == other.evidence["all_rows"]


def test_evidence_equals_a_count_over_dense_maps() -> None:
    ids = text()[:2]
    gpt2 = model()
    gpt2.set_attn_implementation("eager")
    with torch.no_grad():
        maps = gpt2(ids, output_attentions=True).attentions
    found = look(ids)
    for layer, weights in zip(found.layers[:3], maps[:3], strict=True):
        for head in range(HEADS):
            evidence = next(r.evidence for r in found.roles if (r.layer, r.head) == (layer, head))
            sums: dict[str, list[float]] = {"previous_token": [], "sink": [], "induction": []}
            even = []
            for b in range(len(ids)):
                for i in range(15, LENGTH):
                    row = weights[b, head, i].double().numpy()
                    sums["previous_token"].append(row[i - 1])
                    sums["sink"].append(row[0])
                    hits = [j for j in range(1, i + 1) if ids[b, j - 1] == ids[b, i]]
                    far = i - min(16, (i + 1) // 4)
                    alone = [j for j in hits if j <= far and ids[b, j] != ids[b, i]]
                    if alone and 4 * len(hits) <= i + 1:
                        sums["induction"].append(row[hits].sum())
                        even.append(len(hits) / (i + 1))
            for name, values in sums.items():
                assert evidence["masses"][name] == pytest.approx(np.mean(values), abs=1e-5)
                assert evidence["all_rows"][name] == len(values)
            assert evidence["all_expected"]["induction"] == pytest.approx(np.mean(even), abs=1e-6)


def test_a_custom_role_is_a_function_of_positions_and_tokens() -> None:
    def same_half(i: Tensor, j: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is not None
        return (ids[:, i[:, 0]][:, :, None] == ids[:, j[0]][:, None]) & (j < i)

    batch = {"input_ids": text()}
    roles = {"same token": same_half, "two back": 2}
    found = attention_patterns(model(), batch, custom_roles=roles, advice=False, similarity=False)
    assert found.roles_of(found.layers[2], 0) == ["two back"]
    assert found.roles_of(found.layers[1], 1) == ["duplicate_token", "same token"]
    assert found.roles_of(found.layers[0], 0) == ["previous_token"]
    for wrong in (lambda i, j, ids: (i - j).float(), lambda i, j, ids: True):
        with pytest.raises(ValueError, match="must return a bool tensor"):
            attention_patterns(model(), batch, custom_roles={"x": wrong}, advice=False)
    with pytest.raises(ValueError, match="custom role 'x' is a str"):
        attention_patterns(model(), batch, custom_roles={"x": "two"}, advice=False)


def test_in_a_short_block_repeated_other_rows_tell_induction_from_an_offset() -> None:
    """Where no other row tells, the evidence names what it cannot be told from."""
    ids = torch.arange(8).repeat(2)[None]
    found = look(ids)
    layer = found.layers[1]
    assert found.roles_of(layer, 0) == ["induction"]
    evidence = next(r.evidence for r in found.roles if (r.layer, r.head) == (layer, 0))
    assert evidence["indistinguishable_from"] == "offset_7"
    assert "local" not in evidence["not_testable"]
    narrow = look(text()[:, :12]).roles[0].evidence
    assert narrow["not_testable"]["local"].startswith("a quarter of 12 keys")
    heads = [((by_offset(7), {"offset_7"}), (by_token(BEFORE), {"induction"}))]
    first = [((by_offset(1), {"previous_token"}), (at_first(), {"sink"}))]
    for period in (8, 10, 12):
        told = look(torch.arange(LENGTH)[None] % period, first + heads)
        layer = told.layers[1]
        if period != 8:
            assert told.roles_of(layer, 0) == ["offset_7"]
        assert told.roles_of(layer, 1) == ["induction"]
    random = look(text(), first + heads)
    assert random.roles_of(random.layers[1], 0) == ["offset_7"]


class Bidirectional(nn.Module):
    """Attention by given scores of positions, one head each, without a mask."""

    def __init__(self, scores: list[Tensor]) -> None:
        super().__init__()
        self.scores = torch.stack(scores)

    def forward(self, input_ids: Tensor) -> Tensor:
        keys = torch.eye(LENGTH).expand(len(input_ids), len(self.scores), -1, -1)
        query = self.scores.expand(len(input_ids), -1, -1, -1)
        return nn.functional.scaled_dot_product_attention(query, keys, keys, scale=1.0)


def test_bidirectional_heads_look_both_ways() -> None:
    eye = STRONG * torch.eye(LENGTH)
    places = torch.arange(LENGTH)
    first = torch.zeros(LENGTH, LENGTH)
    first[:, 0] = STRONG
    near = -0.7 * (places[:, None] - places).abs().float()
    heads = [eye.roll(-1, 1), eye.roll(1, 1), first, near, torch.zeros(LENGTH, LENGTH)]
    found = attention_patterns(Bidirectional(heads), {"input_ids": text()}, advice=False)
    layer = found.layers[0]
    assert found.kinds[layer] == "bidirectional"
    named = [found.roles_of(layer, head) for head in range(len(heads))]
    assert named == [["previous_token"], ["offset_-1"], ["sink"], ["local"], ["uniform"]]


class ByToken(nn.Module):
    """Causal heads that match the query's token with the token ``shift`` before each key."""

    def __init__(self, shifts: list[int], vocabulary: int, score: float = STRONG) -> None:
        super().__init__()
        self.shifts, self.vocabulary, self.score = shifts, vocabulary, score

    def forward(self, input_ids: Tensor) -> Tensor:
        tokens = nn.functional.one_hot(input_ids, self.vocabulary).float()
        keys = []
        for shift in self.shifts:
            key = tokens.roll(shift, 1)
            edge = slice(0, shift) if shift >= 0 else slice(shift, None)
            key[:, edge] = 0
            keys.append(key)
        key = torch.stack(keys, 1)
        query = self.score * tokens[:, None].expand_as(key)
        return nn.functional.scaled_dot_product_attention(
            query, key, key, scale=1.0, is_causal=True
        )


def test_heads_that_match_tokens_are_told_apart_on_english_text() -> None:
    english = (pytest.__doc__ or "") + (torch.nn.functional.scaled_dot_product_attention.__doc__)
    ids = torch.tensor([list(english.encode())[:400]])
    shifts = {1: "induction", 0: "duplicate_token", 2: None, 3: None, -1: None}
    found = attention_patterns(
        ByToken(list(shifts), 256), {"input_ids": ids}, advice=False, similarity=False
    )
    for head, expected in enumerate(shifts.values()):
        named = set(found.roles_of(found.layers[0], head))
        if expected is None:
            assert not named & {"induction", "duplicate_token", "previous_token", "self"}, head
        else:
            assert expected in named, head
            assert not named & {"induction", "duplicate_token", "previous_token"} - {expected}
