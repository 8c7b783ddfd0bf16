"""Interception of every attention call: it changes what it is asked to, and leaves nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from stabmon.capture import AttentionCapture
from stabmon.capture.intercept import AttentionSite, intercepted
from stabmon.operator.from_call import operator_of

IDS = torch.arange(24).reshape(2, 12) % 50


def llama(attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention)
    return model.eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    ).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return BertModel(config, add_pooling_layer=False).eval()


class HandMade(nn.Module):
    """Calls torch's fused attention itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.project = nn.Embedding(50, 32), nn.Linear(32, 96)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            self.project(self.embed(input_ids)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        )
        return (
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )


class Stock(nn.Module):
    """Torch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 32, batch_first=True), 2
        )

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(self.embed(input_ids))


MODELS = {
    "llama sdpa": (llama, 2),
    "llama eager": (lambda: llama("eager"), 2),
    "gpt2": (gpt2, 2),
    "bert": (bert, 2),
    "hand-made": (HandMade, 1),
    "nn.TransformerEncoder": (lambda: Stock().eval(), 2),
}


def first(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_every_call_is_seen_and_the_output_is_rebuilt_from_weights_and_values(name: str) -> None:
    make, layers = MODELS[name]
    model = make()
    plain, seen, interface = first(model(input_ids=IDS)), [], AttentionInterface.get_interface

    def around(site: AttentionSite) -> object:
        seen.append(site.layer)
        attention = operator_of(site.read(), "dense")
        value = site.arguments["value"]
        own = attention.matvec(value.repeat_interleave(attention.heads // value.shape[1], 1)).to(
            value.dtype
        )
        torch.testing.assert_close(own, site.output(site.run()), rtol=1e-4, atol=1e-5)
        return site.result(own)

    with intercepted(model, around):
        rebuilt = first(model(input_ids=IDS))
    assert len(seen) == len(set(seen)) == layers
    torch.testing.assert_close(rebuilt, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(first(model(input_ids=IDS)), plain)
    assert AttentionInterface.get_interface is interface
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_an_error_of_around_reaches_the_caller_and_leaves_nothing_behind() -> None:
    model, interface = llama(), AttentionInterface.get_interface

    def around(site: AttentionSite) -> object:
        raise KeyError(site.layer)

    with pytest.raises(KeyError, match="self_attn"), intercepted(model, around):
        model(input_ids=IDS)
    assert AttentionInterface.get_interface is interface
    assert not model._forward_pre_hooks
    assert torch.overrides._get_current_function_mode() is None


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_capture_sees_the_same_calls_around_and_inside_of_an_interception(attention: str) -> None:
    model, acted, seen = llama(attention), [], []

    def around(site: AttentionSite) -> object:
        acted.append(site.layer)
        return site.run()

    capture = AttentionCapture(model, lambda call: seen.append((call.layer, call.scores is None)))
    with capture, intercepted(model, around):
        model(input_ids=IDS)
    with intercepted(model, around), capture:
        model(input_ids=IDS)
    layers = [f"model.layers.{i}.self_attn" for i in range(2)]
    assert acted == 2 * layers
    assert seen == 2 * [(layer, True) for layer in layers]
    assert capture.calls == {"transformers": 2}


@torch.no_grad()
def test_arguments_that_are_changed_reach_the_kernel() -> None:
    model = llama()
    with intercepted(model, lambda site: site.run(value=torch.zeros_like(site.arguments["value"]))):
        silenced = model.model.layers[0].self_attn.o_proj.weight.new_tensor(0)
        outputs: list[torch.Tensor] = []
        handle = model.model.layers[0].self_attn.register_forward_hook(
            lambda *given: outputs.append(given[2][0])
        )
        model(input_ids=IDS)
        handle.remove()
    assert bool((outputs[0] == silenced).all())
