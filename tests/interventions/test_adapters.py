"""What queries and keys effectively become under PEFT's adapters, against matrices that are formed,
and what acts do with them.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from stabmon.interventions import NotApplicable, TrainingRun
from stabmon.interventions.cap_query_key_update import CapQueryKeyUpdate
from stabmon.interventions.lower_learning_rate import LowerLearningRate
from stabmon.interventions.qk_clip import QkClip
from stabmon.projections.head_rows import Rows
from stabmon.projections.locate import find_effective, find_query_key, is_adapted, trained_rows
from tests.support.intervention_runs import growth, make_run, scores_of, train_step
from tests.support.small_runs import batches, gpt2, llama

SEPARATE = ["q_proj", "k_proj", "v_proj"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=16, target_modules=SEPARATE),
    "lora of queries alone": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, target_modules=SEPARATE),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=SEPARATE),
    "ia3": lambda: peft.IA3Config(target_modules=SEPARATE, feedforward_modules=[]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=SEPARATE),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=SEPARATE),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=SEPARATE),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "k_proj"]),
    "fused lora": lambda: peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
}
ATTENTION = {"fused lora": "base_model.model.transformer.h.0.attn"}


def adapted(name: str, config: Any = None) -> tuple[Any, nn.Module]:
    """A model with adapters that are not at their start, and its first attention module."""
    model = peft.get_peft_model(
        (gpt2 if name == "fused lora" else llama)(), config or CONFIGS[name]()
    )
    torch.manual_seed(7)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each += 0.1 * torch.randn_like(each)
    return model, model.get_submodule(
        ATTENTION.get(name, "base_model.model.model.layers.0.self_attn")
    )


def formed(module: nn.Module) -> torch.Tensor:
    """W_q and W_k as PEFT itself merges them."""
    merged = copy.deepcopy(module)
    found = []
    for name in ("q_proj", "k_proj", "c_attn"):
        each = getattr(merged, name, None)
        if each is not None:
            if hasattr(each, "merge"):
                each.merge()
            weight = each.get_base_layer().weight if hasattr(each, "merge") else each.weight
            found.append(
                weight.detach().double().T[:64] if name == "c_attn" else weight.detach().double()
            )
    return torch.cat(found)


@pytest.mark.parametrize("name", CONFIGS)
def test_norms_are_those_of_the_matrices_that_are_formed(name: str) -> None:
    model, module = adapted(name)
    update = find_effective(module)
    assert update is not None
    assert is_adapted(module)
    before = formed(module)
    with torch.autocast("cpu", torch.bfloat16):  # as where somebody's loop steps within it
        assert float(update.before()) == pytest.approx(float(before.norm()), rel=1e-5)
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each += 1e-3 * torch.randn_like(each)
    moved = float((formed(module) - before).norm())
    with torch.autocast("cpu", torch.bfloat16):
        assert float(update.change()) == pytest.approx(moved, rel=1e-3)
    assert 0 < float(update.change()) < 0.02 * float(before.norm())


def test_an_adapter_of_another_kind_is_told_by_its_name_and_its_updates_are_left_out() -> None:
    _, module = adapted("oft", peft.OFTConfig(oft_block_size=4, target_modules=SEPARATE))
    with pytest.raises(NotApplicable, match="an unknown kind"):
        find_effective(module)
    assert is_adapted(module)


class Packed(nn.Linear):
    """A linear map whose weight is held as bytes."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.step = float(plain.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter(
            (plain.weight.detach() / self.step).round().to(torch.int8), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step)


def test_a_base_whose_numbers_are_packed_is_known_by_what_it_makes() -> None:
    _, module = adapted("lora")
    plain = find_effective(module)
    packed = copy.deepcopy(module)
    packed.q_proj.base_layer, packed.k_proj.base_layer = (
        Packed(each.base_layer) for each in (module.q_proj, module.k_proj)
    )
    found = find_effective(packed)
    assert plain is not None
    assert found is not None
    assert float(found.before()) == pytest.approx(float(plain.before()), rel=1e-2)
    assert is_adapted(packed)


def test_a_model_without_adapters_has_none_and_one_under_prompts_is_frozen() -> None:
    plain = llama().model.layers[0].self_attn
    assert find_effective(plain) is None
    assert not is_adapted(plain)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    module = peft.get_peft_model(llama(), config).base_model.model.layers[0].self_attn
    assert find_effective(module) is None
    assert is_adapted(module)
    with pytest.raises(NotApplicable, match="q_proj is frozen"):
        find_query_key(module)


def run_of(name: str, optimizer: Any = torch.optim.SGD) -> tuple[TrainingRun, nn.Module, str]:
    model, module = adapted(name)
    run = make_run(model, {"input_ids": batches(1)[0]}, None)
    run.optimizer = optimizer([each for each in model.parameters() if each.requires_grad], lr=0.05)
    return run, module, next(iter(run.layers))


@pytest.mark.parametrize("name", ["lora", "lora of queries alone", "fused lora"])
def test_a_clip_of_lora_is_refused_in_the_users_terms_and_names_no_cause_that_is_not_the_case(
    name: str,
) -> None:
    run, _, layer = run_of(name)
    with pytest.raises(NotApplicable, match="adapter around a frozen weight") as error:
        QkClip(target=1e-4).apply(run, growth(layer))
    assert error.value.advice == "lower the learning rate of the adapters"


@pytest.mark.parametrize("name", ["dora", "ia3"])
def test_adapters_that_scale_each_feature_are_clipped_by_what_they_scale_with_and_the_base_is_left(
    name: str,
) -> None:
    run, _, layer = run_of(name)
    head, frozen = 1, [p.detach().clone() for p in run.model.parameters() if not p.requires_grad]
    before = run.max_logit(layer, head)
    applied = QkClip(target=before / 2).apply(run, growth(layer, head))
    assert applied.record["layer"] == layer
    train = [p for p in run.model.parameters() if not p.requires_grad]
    assert all(torch.equal(p, was) for p, was in zip(train, frozen, strict=True))
    assert float(scores_of(run)[layer][head]) == pytest.approx(before / 2, rel=1e-3)
    assert applied.undo()
    assert float(scores_of(run)[layer][head]) == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("name", ["lora", "dora", "lora of queries alone"])
def test_a_lower_rate_of_queries_and_keys_is_one_of_their_adapters(name: str) -> None:
    moved = []
    for factor in (None, 0.25):
        run, module, _ = run_of(name)
        if factor is not None:
            LowerLearningRate(factor=factor, where="query_key").apply(run)
        own = [p for part, p in module.named_parameters() if p.requires_grad]
        before = [p.detach().clone() for p in own]
        train_step(run)
        names = [part for part, p in module.named_parameters() if p.requires_grad]
        moved.append(
            {part: p.detach() - was for part, p, was in zip(names, own, before, strict=True)}
        )
    for part, whole in moved[0].items():
        torch.testing.assert_close(
            moved[1][part], whole * (1.0 if "v_proj" in part else 0.25), rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_a_cap_on_updates_holds_what_queries_and_keys_effectively_become(name: str) -> None:
    run, module, _ = run_of(name, torch.optim.Adam)
    before = formed(module)
    CapQueryKeyUpdate(share=1e-3).apply(run)
    train_step(run)
    share = float((formed(module) - before).norm() / before.norm())
    assert share == pytest.approx(1e-3, rel=0.1)


def test_a_lower_rate_where_everything_is_frozen_says_so() -> None:
    model = peft.get_peft_model(
        llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    run = make_run(model, {"input_ids": batches(1)[0]}, None)
    run.optimizer = torch.optim.SGD(
        [each for each in model.parameters() if each.requires_grad], lr=0.1
    )
    for act in (LowerLearningRate(where="query_key"), CapQueryKeyUpdate(share=0.1)):
        with pytest.raises(NotApplicable, match="q_proj is frozen"):
            act.apply(run)


def test_rows_of_adapters_are_all_of_them_but_those_of_values() -> None:
    _, module = adapted("lora")
    rows = trained_rows(module)
    assert all(isinstance(each, Rows) for each in rows)
    assert {id(each.parameter) for each in rows} == {
        id(p) for name, p in module.named_parameters() if p.requires_grad and "v_proj" not in name
    }
