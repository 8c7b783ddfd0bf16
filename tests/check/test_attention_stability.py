"""A check distinguishes healthy from broken models, names faults, leaves no trace."""

from typing import Any

import pytest
import torch
from torch import nn

import stabmon
from stabmon.check import StabilityReport
from tests.support import check_models as models
from tests.support.small_runs import clean, same_bits, weights

HEALTHY = {
    "gpt2": lambda: (models.gpt2(), models.tokens()),
    "gpt2 eager": lambda: (models.gpt2("eager"), models.tokens()),
    "llama": lambda: (models.llama(), models.tokens()),
    "qwen3": lambda: (models.qwen3(), models.tokens()),
    "bert": lambda: (models.bert(), models.tokens()),
    "vit": lambda: (models.vit(), models.image()),
    "hand-written": lambda: (models.hand_written(), models.noise()),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_passes_in_every_precision(name: str, dtype: str) -> None:
    report = stabmon.check_attention_stability(*HEALTHY[name](), dtype)
    assert report["verdict"] == "pass"
    assert report["recommendations"] == []
    assert report["float16_safe"]
    assert report["bfloat16_safe"]


def broken_init(attention: str = "sdpa", factor: float = 10.0) -> Any:
    return models.gpt2(attention, initializer_range=0.02 * factor)


def damaged() -> Any:
    model = models.llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[64:96] *= 200
    return model


BROKEN = {
    "init ten times too large": (
        lambda: (broken_init(), models.tokens()),
        "fp32",
        "saturated_softmax",
        "error",
    ),
    "no scale": (
        lambda: (models.hand_written(scale=1.0), models.noise()),
        "fp32",
        "scale_missing",
        "warning",
    ),
    "head dimension 2": (
        lambda: (models.gpt2(n_head=64), models.tokens()),
        "fp32",
        "head_dim_too_small",
        "warning",
    ),
    "overflow": (
        lambda: (broken_init("eager", 300.0), models.tokens()),
        "fp16",
        "overflow_risk",
        "critical",
    ),
    "one head": (lambda: (damaged(), models.tokens()), "fp32", "damaged_head", "error"),
    "no norm": (
        lambda: (models.hand_written(gain=5.0), models.noise()),
        "fp32",
        "inputs_not_normalised",
        "warning",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_with_what_to_do(case: str) -> None:
    make, dtype, name, severity = BROKEN[case]
    report = stabmon.check_attention_stability(*make(), dtype)
    found = {each.name: each for each in report.findings}
    assert name in found
    assert found[name].severity == severity
    assert found[name].recommendation is not None
    assert report["recommendations"]
    assert f"**{severity}: {name}**" in report.to_markdown()


def test_the_damaged_head_is_named_and_no_other() -> None:
    report = stabmon.check_attention_stability(damaged(), models.tokens())
    (found,) = [each for each in report.findings if each.name == "damaged_head"]
    assert (found.layer, found.head, found.also) == ("model.layers.1.self_attn", 2, 0)
    assert found.value == pytest.approx(200, rel=0.1)
    assert (report.heads()[0]["layer"], report.heads()[0]["head"]) == (
        "model.layers.1.self_attn",
        2,
    )


def test_overflow_binds_where_the_product_is_written_in_float16_alone() -> None:
    names = {}
    for attention, dtype in (("eager", "fp16"), ("eager", "bf16"), ("sdpa", "fp16")):
        report = stabmon.check_attention_stability(
            broken_init(attention, 300.0), models.tokens(), dtype
        )
        names[attention, dtype] = {each.name for each in report.findings}
    assert {key for key, found in names.items() if "overflow_risk" in found} == {("eager", "fp16")}
    eager = stabmon.check_attention_stability(broken_init("eager", 300.0), models.tokens(), "bf16")
    assert not eager["float16_safe"]


def test_a_forward_that_is_not_finite_in_the_format_is_traced() -> None:
    report = stabmon.check_attention_stability(broken_init("eager", 300.0), models.tokens(), "fp16")
    (found,) = [each for each in report.findings if each.name == "non_finite"]
    assert found.severity == "critical"
    assert found.layer is not None


def test_finite_weights_that_give_nan_are_found_in_float32_too() -> None:
    model = models.llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.fill_(1e30)
        model.model.layers[1].self_attn.k_proj.weight.fill_(1e30)
    report = stabmon.check_attention_stability(model, models.tokens())
    (found,) = [each for each in report.findings if each.name == "non_finite"]
    assert found.layer == "model.layers.1.self_attn"
    assert report["verdict"] == "fail"


def test_rounding_a_position_bias_is_a_warning_at_most() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(hidden_size=256, n_layer=1, n_head=16, vocab_size=256, use_cache=False)
    model = models.seeded(lambda: BloomForCausalLM(config))
    report = stabmon.check_attention_stability(model, models.tokens(512, 1), "bf16")
    (found,) = report.findings
    assert (found.name, found.severity) == ("precision_insufficient", "warning")
    assert found.value >= 0.1
    assert report["bfloat16_safe"]


def test_a_format_is_enough_where_it_keeps_the_bits_that_are_needed() -> None:
    """Test queries and keys with a common part.

    So scores are large and close to each other: the worst case for rounding.
    """
    verdicts = set()
    for common in (0.0, 3.0, 30.0):
        model = models.gpt2()
        with torch.no_grad():
            model.transformer.h[0].attn.c_attn.bias[: 2 * models.WIDTH] = common
        report = stabmon.check_attention_stability(model, models.tokens(32, 1), "bf16")
        for fit in report["precision"]:
            assert (fit["moved"] < fit["allowed"]) == (fit["bits_needed"] <= fit["bits_kept"])
            assert fit["safe"] == (fit["bits_needed"] <= fit["bits_kept"] and fit["headroom"] > 2)
            verdicts.add((fit["path"], fit["dtype"], fit["safe"]))
        assert report["bfloat16_safe"] == (report["precision_bits_needed"] <= 8)
    assert {
        (path, "bf16", safe) for path in ("eager", "fused") for safe in (True, False)
    } <= verdicts
    assert "allowed" in report.to_markdown()


def test_nan_weights_are_a_finding_that_names_the_tensors() -> None:
    model = models.llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    report = stabmon.check_attention_stability(model, models.tokens())
    (found,) = report.findings
    assert found.name == "non_finite"
    assert "model.layers.1.self_attn.k_proj.weight (1 NaN of" in found.text
    assert report["verdict"] == "fail"
    assert not report["float16_safe"]
    assert report.to_markdown()


def test_the_report_is_a_mapping_with_the_promised_keys() -> None:
    report = stabmon.check_attention_stability(models.gpt2(), models.tokens())
    assert isinstance(report, StabilityReport)
    promised = {
        "expected_logit_max",
        "curvature_bound",
        "precision_bits_needed",
        "float16_safe",
        "bfloat16_safe",
        "recommendations",
    }
    assert promised <= set(report)
    assert dict(report) == report.to_dict()
    assert 0 < report["expected_logit_max"] < 2
    assert report["precision_bits_needed"] < 8
    shares = list(report["expected_entropy_share_by_length"].values())
    assert shares == sorted(shares)
    assert 0.9 < shares[0] < shares[-1] < 1


def test_a_longer_length_expects_larger_scores_and_stays_a_fact_of_arithmetic() -> None:
    short, long = (
        stabmon.check_attention_stability(models.llama(), models.tokens(), {"seq_len": n})
        for n in (64, 131_072)
    )
    ratio = long["expected_logit_max"] / short["expected_logit_max"]
    assert ratio == pytest.approx((17 / 6) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training: bool) -> None:
    model = models.gpt2(attn_pdrop=0.1, resid_pdrop=0.1).train(training)
    model.transformer.h[0].eval()
    for place, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(place)) if place % 2 else None
    before = weights(model), {name: each.grad for name, each in model.named_parameters()}
    grads = {name: None if each is None else each.clone() for name, each in before[1].items()}
    modes, version = (
        [each.training for each in model.modules()],
        [each._version for each in model.parameters()],
    )
    state = torch.get_rng_state()
    stabmon.check_attention_stability(model, models.tokens(), "bf16")
    assert same_bits(weights(model), before[0])
    assert all(each.grad is before[1][name] for name, each in model.named_parameters())
    assert all(each is None or torch.equal(each, before[1][name]) for name, each in grads.items())
    assert [each.training for each in model.modules()] == modes
    assert [each._version for each in model.parameters()] == version
    assert torch.equal(torch.get_rng_state(), state)
    assert clean(model)
    assert torch.is_grad_enabled()


def test_the_same_model_gives_the_same_report_also_with_dropout() -> None:
    model = models.gpt2(attn_pdrop=0.1, resid_pdrop=0.1).train()
    first = stabmon.check_attention_stability(model, models.tokens())
    torch.rand(7)
    assert stabmon.check_attention_stability(model, models.tokens()).to_dict() == first.to_dict()


def test_frozen_models_and_modules_without_names_are_checked_by_what_they_show() -> None:
    model = models.gpt2().requires_grad_(False)
    report = stabmon.check_attention_stability(model, models.tokens())
    assert report["verdict"] == "pass"
    assert report["gradients"] == {}
    assert any("frozen" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("model", "sample", "config", "says"),
    [
        (
            models.gpt2,
            models.tokens(),
            "fp8",
            "check config: dtype: unknown precision 'fp8'. Known: fp16 (float16, half",
        ),
        (
            models.gpt2,
            models.tokens(),
            {"dtipe": "fp16"},
            "check config: dtipe: unknown key, did you mean 'dtype'",
        ),
        (
            models.gpt2,
            models.tokens(),
            {"seq_len": 1},
            "check config: seq_len: 1 must be a whole number of at least 2",
        ),
        (lambda: nn.Linear(4, 4), torch.ones(2, 4), None, "no attention was found in Linear"),
        (models.gpt2, 3, None, "sample_input is a int"),
    ],
)
def test_a_wrong_call_says_so_in_one_line(model: Any, sample: Any, config: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        stabmon.check_attention_stability(model(), sample, config)
