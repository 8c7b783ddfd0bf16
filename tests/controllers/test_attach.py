"""Attaching leaves a model what it is, detaching leaves it as it was, and what trains elsewhere
trains here.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers.modeling_utils import AttentionInterface

from stabmon.controllers import (
    attach_controllers,
    detach_controllers,
    load_controllers,
    save_controllers,
)
from stabmon.controllers.attention_function import PREFIX
from tests.support.attention_zoo import tokens, zoo
from tests.support.controlled_attention import built, output_of, scatter
from tests.support.small_runs import clean


def state(model: Any) -> dict[str, Any]:
    """All that attaching could have changed."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "config": model.config.to_dict(),
        "configs": {
            name: id(module.config)
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": [
            len(module._forward_pre_hooks) + len(module._forward_hooks)
            for module in model.modules()
        ],
        "kwargs": [
            len(m._forward_pre_hooks_with_kwargs) + len(m._forward_hooks_always_called)
            for m in model.modules()
        ],
        "names": sorted(
            name for name in AttentionInterface._global_mapping if not name.startswith(PREFIX)
        ),
        "classes": [type(module) for module in model.modules()],
    }


@pytest.mark.parametrize("kind", ["info_density", "linearization", "linear_ramp"])
@pytest.mark.parametrize("family", ["gpt2-sdpa", "llama-eager", "bert-sdpa", "vit-sdpa", "t5-sdpa"])
@torch.no_grad()
def test_detaching_leaves_everything_as_it_was(family: str, kind: str) -> None:
    model, inputs = zoo()[family]()
    model.eval()
    before, output = state(model), output_of(model, inputs)
    scatter(attach_controllers(model, kind))
    output_of(model, inputs)
    detach_controllers(model)
    after = state(model)
    assert not [name for name in AttentionInterface._global_mapping if name.startswith(PREFIX)], (
        "nothing of ours stays behind"
    )
    weights, same = before.pop("state"), after.pop("state")
    assert before == after
    assert list(weights) == list(same)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert torch.equal(output, output_of(model, inputs))
    assert clean(model)
    detach_controllers(model)


@torch.no_grad()
def test_a_model_that_failed_can_still_be_used_and_detached() -> None:
    model, inputs, controllers = built("llama-sdpa")
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10_000))
    with pytest.raises(ValueError, match="not with hidden states"):
        model.model.layers[0].self_attn(
            torch.zeros(1, 3, 8), position_embeddings=None, attention_mask=None
        )
    assert all(member.call is None for member in controllers.values())
    output_of(model, inputs)


def test_layers_are_chosen_by_place_and_by_pattern() -> None:
    model, _ = zoo()["llama-sdpa"]()
    for layers, expected in (
        (-1, [1]),
        ("model.layers.0.*", [0]),
        ([0, "*1.self_attn"], [0, 1]),
        (None, [0, 1]),
    ):
        controllers = attach_controllers(model, layers=layers)
        assert list(controllers) == [f"model/layers/{n}/self_attn" for n in expected]
        detach_controllers(model)
    for layers in (2, "encoder.*"):
        with pytest.raises(ValueError, match=r"names none of model\.layers\.0"):
            attach_controllers(model, layers=layers)


def test_parameters_have_stable_names_in_the_model() -> None:
    model, _ = zoo()["gpt2-sdpa"]()
    attach_controllers(model, form="both")
    ours = [name for name, _ in model.named_parameters() if "stabmon" in name]
    assert ours[:4] == [
        f"transformer.h.0.attn.stabmon_controller.{part}_{kind}"
        for part in ("key_bias", "query_gain")
        for kind in ("weight", "bias")
    ]


def test_attaching_draws_no_random_number_and_twice_is_refused() -> None:
    model, _ = zoo()["gpt2-sdpa"]()
    before = torch.get_rng_state()
    attach_controllers(model)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="detach_controllers"):
        attach_controllers(model)


def test_what_cannot_be_controlled_is_told() -> None:
    with pytest.raises(ValueError, match="transformers"):
        attach_controllers(torch.nn.Linear(2, 2))
    model, _ = zoo()["llama-sdpa"]()
    with pytest.raises(ValueError, match="did you mean 'info_density'"):
        attach_controllers(model, "info_densty")


@torch.no_grad()
def test_cross_attention_is_left_alone() -> None:
    model, inputs = zoo()["t5-sdpa"]()
    controllers = attach_controllers(model.eval())
    assert not any("EncDec" in name for name in controllers)
    assert len(controllers) == 2
    scatter(controllers)
    output_of(model, inputs)


@pytest.mark.parametrize("form", ["key_bias", "query_gain", "both"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(form: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model, inputs = zoo()["llama-sdpa"]()
        controllers = attach_controllers(model, form=form)
        scatter(controllers)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
        assert all(member.call is None for member in controllers.values())
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["info_density", "linear_ramp"])
def test_autocast_gives_nearly_the_same(kind: str) -> None:
    model, inputs, controllers = built("llama-sdpa", kind)
    exact = output_of(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = output_of(model, inputs)
        found.float().square().mean().backward()
    assert (found.float() - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.02
    assert all(p.grad is not None and p.grad.isfinite().all() for p in controllers.parameters())


@torch.no_grad()
def test_a_half_precision_model_keeps_controllers_in_float32() -> None:
    model, inputs = zoo()["llama-sdpa"]()
    model = model.bfloat16().eval()
    controllers = attach_controllers(model, form="both")
    assert {p.dtype for p in controllers.parameters()} == {torch.float32}
    scatter(controllers)
    assert output_of(model, inputs).dtype == torch.bfloat16


def test_dropout_is_the_models_own() -> None:
    model, inputs = zoo()["llama-sdpa"]()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    attach_controllers(model, form="query_gain")
    torch.manual_seed(0)
    controlled = output_of(model, inputs)
    detach_controllers(model)
    torch.manual_seed(0)
    assert torch.equal(controlled, output_of(model, inputs))


@torch.no_grad()
def test_the_attention_function_can_be_changed_while_controllers_are_attached() -> None:
    model, inputs, _ = built("llama-sdpa", form="both")
    fused = output_of(model, inputs)
    model.set_attn_implementation("eager")
    eager = output_of(model, inputs)
    torch.testing.assert_close(fused, eager, atol=2e-4, rtol=1e-4)
    assert model(**inputs, output_attentions=True).attentions[0].shape == (2, 4, 12, 12)


@torch.no_grad()
def test_copies_and_pickles_are_controlled_too() -> None:
    model, inputs, _ = built("gpt2-sdpa", form="both")
    expected = output_of(model, inputs)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    detach_controllers(model)
    for twin in twins:
        assert torch.equal(output_of(twin, inputs), expected)
        detach_controllers(twin)
        assert torch.equal(output_of(twin, inputs), output_of(model, inputs))


@pytest.mark.parametrize("kind", ["info_density", "linear_ramp", "linearization"])
@torch.no_grad()
def test_saved_and_loaded_controllers_are_the_same(kind: str, tmp_path: Any) -> None:
    model, inputs, controllers = built("llama-sdpa", kind, layers=[1])
    expected = output_of(model, inputs)
    save_controllers(controllers, tmp_path)
    detach_controllers(model)
    with pytest.raises(ValueError, match="attach_controllers"):
        save_controllers(model, tmp_path)
    loaded = load_controllers(model, tmp_path)
    assert list(loaded) == list(controllers)
    assert torch.equal(output_of(model, inputs), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "controllers.json",
        "controllers.safetensors",
    ]


@torch.no_grad()
def test_loading_into_another_base_is_refused(tmp_path: Any) -> None:
    model, _, _ = built("llama-sdpa", form="both")
    save_controllers(model, tmp_path)
    for other, word in ((zoo()["qwen3-sdpa"]()[0], "Qwen3ForCausalLM"),):
        with pytest.raises(ValueError, match=word):
            load_controllers(other, tmp_path)
    detach_controllers(model)
    model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="strict=False"):
        load_controllers(model, tmp_path)
    assert clean(model)
    load_controllers(model, tmp_path, strict=False)
    from tests.support.attention_zoo import llama_like

    wider, _ = llama_like("Llama", "sdpa", num_attention_heads=2)
    with pytest.raises(ValueError, match=r"self_attn was .*heads"):
        load_controllers(wider, tmp_path)
    assert tokens()


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("llama-sdpa", "info_density", {"form": "both"}),
        ("gpt2-sdpa", "linear_ramp", {"learned": True}),
    ],
)
def test_a_compiled_model_gives_and_learns_the_same(
    family: str, kind: str, options: dict[str, Any]
) -> None:
    model, inputs, controllers = built(family, kind, **options)
    loss = output_of(model, inputs).square().mean()
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in controllers.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    compiled = output_of(torch.compile(model, backend="aot_eager"), inputs).square().mean()
    compiled.backward()
    torch.testing.assert_close(compiled, loss, atol=1e-6, rtol=1e-5)
    for name, parameter in controllers.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)
