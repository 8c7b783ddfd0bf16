"""Caches, left padding, packed sequences, mixed precision and wrappers around the model."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from stabmon.capture import AttentionCapture
from stabmon.capture.adapters.transformers_kernels import read_flash
from stabmon.records import AttentionCall
from tests.support.attention_zoo import HEADS, VOCABULARY, gpt2, llama_like, tokens, zoo
from tests.support.probability_oracle import captured, probabilities, returned


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunks", [(8, 4), (8, 1, 1, 2)])
def test_with_a_cache_the_rows_are_those_of_the_whole_sequence(
    implementation: str, chunks: tuple[int, ...]
) -> None:
    model, inputs = llama_like("Llama", implementation)
    ids = inputs["input_ids"]
    whole, _, _ = captured(model, {"input_ids": ids})
    from transformers import DynamicCache

    cache, start = DynamicCache(config=model.config), 0
    for size in chunks:
        part = {
            "input_ids": ids[:, start : start + size],
            "past_key_values": cache,
            "use_cache": True,
        }
        with torch.no_grad():
            found, _, _ = captured(model, part)
        for layer, p in found.items():
            expected = whole[layer][:, :, start : start + size, : start + size]
            torch.testing.assert_close(p, expected, atol=1e-5, rtol=1e-4)
        start += size


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_of_left_padded_sequences_are_those_of_the_sequence_alone(implementation: str) -> None:
    model, _ = llama_like("Mistral", implementation, sliding_window=5)
    inputs = tokens(padding=4, side="left")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found, _, _ = captured(model, inputs | {"position_ids": positions})
        alone, _, _ = captured(model, {"input_ids": inputs["input_ids"][1:, 4:]})
    for layer, p in found.items():
        torch.testing.assert_close(p[1:, :, 4:, 4:], alone[layer], atol=1e-5, rtol=1e-4)
        assert p[1, :, 4:, :4].abs().max() == 0


def test_packed_sequences_do_not_see_each_other() -> None:
    for implementation in ("sdpa", "eager"):
        model, inputs = llama_like("Llama", implementation)
        ids = inputs["input_ids"][:1]
        positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
        found, _, _ = captured(model, {"input_ids": ids, "position_ids": positions})
        alone, _, _ = captured(model, {"input_ids": ids[:, 5:]})
        for layer, p in found.items():
            torch.testing.assert_close(p[..., 5:, 5:], alone[layer], atol=1e-5, rtol=1e-4)


def flash(**changes: Any) -> AttentionCall:
    module = nn.Module()
    module.is_causal = True
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    given = {
        "module": module,
        "query": query,
        "key": key,
        "attention_mask": None,
        "scaling": 0.2,
        "sliding_window": None,
    }
    return read_flash("a", given | changes, torch.bfloat16)


AGE = torch.arange(6)[:, None] - torch.arange(6)


def test_a_flash_call_is_causal_windowed_and_capped_as_it_says() -> None:
    call = flash(sliding_window=3, softcap=20.0, s_aux=torch.arange(4.0))
    assert (call.is_causal, call.window, call.softcap, call.mask, call.scale) == (
        True,
        3,
        20.0,
        None,
        0.2,
    )
    assert call.sinks.tolist() == [0, 1, 2, 3]
    assert call.query.dtype == call.dtype == torch.bfloat16
    assert call.fused
    assert flash(sliding_window=6).window is None
    assert flash(is_causal=False).is_causal is False


def test_a_flash_window_without_causality_reaches_both_ways() -> None:
    call = flash(is_causal=False, sliding_window=3)
    assert call.window is None
    assert torch.equal(call.mask, AGE.abs() < 3)


def test_a_flash_padding_mask_hides_keys_and_leaves_padded_rows_empty() -> None:
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    p = probabilities(flash(attention_mask=padding))
    assert p[1, :, :2].isnan().all()
    assert p[1, :, 2:, :2].abs().max() == 0
    assert torch.equal(p[0] > 0, (AGE >= 0).expand(4, 6, 6))


@pytest.mark.parametrize(
    "packing",
    [
        {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]])},
        {
            "cu_seq_lens_q": torch.tensor([0, 2, 6]),
            "cu_seq_lens_k": torch.tensor([0, 2, 6]),
            "max_length_q": 4,
            "max_length_k": 4,
        },
    ],
)
def test_packed_flash_sequences_do_not_see_each_other(packing: dict[str, Any]) -> None:
    p = probabilities(flash(query=torch.randn(1, 4, 6, 8), key=torch.randn(1, 2, 6, 8), **packing))
    first = torch.arange(6) < 2
    assert torch.equal(p[0, 0] > 0, (AGE >= 0) & (first[:, None] == first))


@pytest.mark.parametrize(
    "name",
    [
        "llama-sdpa",
        "llama-eager",
        "gemma2-eager",
        "hand_written-fused",
        "hand_written-alibi",
        "bloom",
    ],
)
def test_under_autocast_query_and_key_have_the_kernel_s_dtype(name: str) -> None:
    model, inputs = zoo()[name]()
    with torch.autocast("cpu", torch.bfloat16):
        found, _, calls = captured(model, inputs)
        twin, _ = zoo()[name.replace("sdpa", "eager")]()
        expected = [] if name.startswith("hand_written") else returned(twin, inputs)
    assert calls
    for call in calls:
        assert call.dtype == call.query.dtype == call.key.dtype == torch.bfloat16
    for p, own in zip(
        list(found.values())[:1], expected, strict=False
    ):  # the second layer's input has been rounded twice
        seen = p.isfinite().all(-1)
        assert (p - own.double())[seen].abs().max() < 0.02


def test_a_half_precision_model_is_read_in_half_precision() -> None:
    model, inputs = gpt2("sdpa")
    _, _, calls = captured(model.bfloat16(), inputs)
    assert {call.dtype for call in calls} == {torch.bfloat16}


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_s_prefix_is_no_part_of_a_name() -> None:
    model, inputs = gpt2("sdpa")
    ddp = nn.parallel.DistributedDataParallel(model)
    layers: list[str] = []
    compiled = torch.compile(ddp, backend="eager")
    for watched, call in ((ddp, ddp), (model, ddp), (compiled, compiled), (model, compiled)):
        layers.clear()
        with AttentionCapture(watched, lambda call: layers.append(call.layer)):
            call(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert layers == ["transformer.h.0.attn", "transformer.h.1.attn"]


@pytest.mark.usefixtures("process_group")
def test_a_model_sharded_by_fully_shard_is_seen_under_its_own_names() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for build in (gpt2, lambda _: zoo()["hand_written-manual"]()):
        (whole, inputs), (model, _) = build("sdpa"), build("sdpa")
        expected, _, _ = captured(whole, inputs)
        for block in [
            m for name, m in model.named_modules() if name in ("transformer.h.0", "blocks.0")
        ]:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found, _, _ = captured(model, inputs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[layer], expected[layer]) for layer in found)


def test_an_adapter_s_prefix_is_no_part_of_a_name() -> None:
    class Adapter(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = Adapter(model)

        def forward(self, **inputs: Any) -> Any:
            return self.base_model.model(**inputs)

    model, inputs = gpt2("sdpa")
    found, _, _ = captured(Wrapper(model), inputs)
    assert list(found) == ["transformer.h.0.attn", "transformer.h.1.attn"]


def test_one_query_per_key_head_group_is_decoded_with_every_head() -> None:
    model, inputs = llama_like("Llama", "sdpa", use_cache=True)
    with (
        torch.no_grad(),
        AttentionCapture(model, lambda call: shapes.append(tuple(call.query.shape))),
    ):
        shapes: list[tuple[int, ...]] = []
        model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=VOCABULARY + 1)
    assert shapes == [(2, HEADS, 12, 8)] * 2 + [(2, HEADS, 1, 8)] * 4
