"""Check the public objects and records of a run, and the fields of version 1 in them."""

import json
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch

import stabmon
from stabmon.sinks import Sink
from stabmon.sinks.reader import read_records
from tests.support.small_runs import gpt2, lines, llama, optimizer_of

SURFACE = Path(__file__).parent / "states" / "surface_1.json"
STORED: dict[str, Any] = json.loads(SURFACE.read_text())
FIELDS: dict[str, list[str]] = STORED["fields"]
SIGNALS: list[str] = STORED["dashboard_signals"]


class Scalars(Sink):
    """Keep the names of all scalars."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def write_reading(self, reading: Any, scalars: Any) -> None:
        self.names |= set(scalars)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train under guard; the weights of one layer's queries and keys jump at step 8."""
    folder = tmp_path_factory.mktemp("guarded")
    model = gpt2()
    optimizer, scalars = optimizer_of(model, 1e-3), Scalars()
    diagnoses = []
    with stabmon.AttentionStabilityMonitor(
        model, optimizer, None, "guard", log_every=1, sinks=["jsonl", scalars], run_dir=folder
    ) as monitor:
        for step in range(1, 15):
            tokens = torch.randint(0, 32, (4, 48), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            if step == 8:
                with torch.no_grad():
                    model.transformer.h[0].attn.c_attn.weight[:, :64].mul_(60.0)
            diagnoses.append(monitor.on_step(loss=loss))
        applied = monitor.applied
        for each in reversed(applied):
            each.undo()
    assert not monitor.errors
    return {
        "monitor": monitor,
        "diagnoses": diagnoses,
        "folder": folder,
        "scalars": scalars.names,
        "applied": applied,
    }


def test_a_monitor_reports_its_run(guarded: dict[str, Any]) -> None:
    monitor = guarded["monitor"]
    assert monitor.issues
    assert monitor.step == 14
    assert monitor.stop_reason is None
    assert (dict(monitor.errors), dict(monitor.unseen)) == ({}, {})
    assert isinstance(monitor.open_issues, tuple)
    assert [each.intervention.name for each in guarded["applied"]] == ["skip_step", "qk_clip"]
    assert [each.active for each in guarded["applied"]] == [False, False]
    assert guarded["applied"][1].record["why"]
    assert guarded["applied"][1].step == 9
    monitor.close()


def test_a_diagnosis_holds_statistics_and_plots(guarded: dict[str, Any], tmp_path: Path) -> None:
    diagnosis = next(each for each in guarded["diagnoses"] if each.has_issues())
    assert (diagnosis.step, bool(diagnosis.issues), bool(diagnosis.open_issues)) == (9, True, True)
    assert len(diagnosis.readings) == 9
    for layer in ("transformer.h.0.attn", "transformer.h.1.attn"):
        assert set(SIGNALS) <= set(diagnosis.stats[layer])
        for values in diagnosis.stats[layer].values():
            assert (values.shape, values.dtype) == ((4,), float)
    for name in ("plot_entropy_heatmap", "plot_curvature_evolution"):
        figure = getattr(diagnosis, name)(tmp_path / f"{name}.png")
        assert figure.axes
        assert (tmp_path / f"{name}.png").stat().st_size > 0


def test_an_issue_holds_its_fields_in_order(guarded: dict[str, Any]) -> None:
    issue = guarded["monitor"].issues[0]
    values = issue.to_dict()
    assert list(values)[: len(FIELDS["issues"])] == FIELDS["issues"]
    assert type(issue).from_dict(values) == issue
    assert issue.is_alarm == (issue.severity in ("error", "critical"))
    assert issue.where == f"{issue.layer} head {issue.head}"
    with pytest.raises(AttributeError):
        issue.step = 3
    positional = stabmon.StabilityIssue(1, "a", 0, "logit_growth", "error", 2.0, 1.0, "clip")
    assert (positional.evidence, positional.eta_steps, positional.state) == ({}, None, "opened")


def assert_fields(values: Any, *names: str) -> None:
    """Check that a record has the stored fields of each of its parts."""
    for name in names:
        assert set(FIELDS[name]) <= values.keys()


def test_the_fields_of_readings(guarded: dict[str, Any]) -> None:
    readings = lines(guarded["folder"] / "stabmon" / "readings.jsonl")
    assert [each["step"] for each in readings] == list(range(1, 15))
    assert {each["schema_version"] for each in readings} == {1}
    for each in readings:
        assert_fields(each, "line", "readings")
        assert set(each["layers"]) == {"transformer.h.0.attn", "transformer.h.1.attn"}
        for signals in each["layers"].values():
            assert set(SIGNALS) <= signals.keys()
            assert {len(values) for values in signals.values()} == {4}
    assert_fields(readings[0]["info"]["transformer.h.0.attn"], "readings.info")
    assert_fields(readings[0]["query_key"]["transformer.h.0.attn"], "readings.query_key")


def test_the_fields_of_issues(guarded: dict[str, Any]) -> None:
    issues = lines(guarded["folder"] / "stabmon" / "issues.jsonl")
    assert {each["schema_version"] for each in issues} == {1}
    assert {each["state"] for each in issues} == {"opened", "closed"}
    assert any("nonfinite" in each for each in issues)
    for each in issues:
        assert_fields(each, "line", "issues")


def test_the_fields_of_the_metadata(guarded: dict[str, Any]) -> None:
    meta = json.loads((guarded["folder"] / "stabmon" / "meta.json").read_text())
    assert_fields(meta, "meta")
    for part in ("versions", "model", "sampling"):
        assert_fields(meta[part], f"meta.{part}")
    assert meta["config"]["log_every"] == 1


def test_the_fields_of_the_audit(guarded: dict[str, Any]) -> None:
    audit = lines(guarded["folder"] / "stabmon" / "interventions.jsonl")
    told = [(each["intervention"], each["action"]) for each in audit]
    assert told[:2] == [("skip_step", "applied"), ("qk_clip", "applied")]
    assert told[-2:] == [("qk_clip", "undone"), ("skip_step", "undone")]
    assert ("qk_clip", "again") in told
    for each in audit:
        again = each["action"] == "again"
        assert_fields(each, "line", "interventions.again" if again else "interventions")
        assert each["action"] != "undone" or "exact" in each


def test_the_records_are_read_again(guarded: dict[str, Any]) -> None:
    records = read_records(guarded["folder"])
    assert [each.step for each in records.readings] == list(range(1, 15))
    assert [(each.step, each.key, each.state) for each in records.issues] == [
        (each.step, each.key, each.state) for each in guarded["monitor"].issues
    ]
    audit = lines(guarded["folder"] / "stabmon" / "interventions.jsonl")
    assert len(records.interventions) == len(audit)
    assert records.meta["schema_version"] == 1
    assert len(records.runs) == 1
    assert records.skipped == ()


def test_the_names_of_the_scalars(guarded: dict[str, Any]) -> None:
    layers = ("transformer.h.0.attn", "transformer.h.1.attn")
    expected = {f"attention/{signal}/{how}" for signal in SIGNALS for how in ("max", "mean", "min")}
    expected |= {f"attention_layers/{layer}/{signal}" for layer in layers for signal in SIGNALS}
    run_wide = ("issues_open", "alarms", "overhead_fraction", "learning_rate_factor")
    expected |= {f"stability/{name}" for name in run_wide}
    assert expected <= guarded["scalars"]


@pytest.mark.parametrize("framework", ["transformers", "lightning"])
def test_a_callback_has_its_attributes_before_training(framework: str) -> None:
    cls = pkgutil.resolve_name(f"stabmon.integrations.{framework}.StabilityCallback")
    callback = cls("guard", log_every=50)
    assert callback.monitor is None
    assert callback.issues == []
    assert callback.config.log_every == 50


def test_the_check_gives_its_verdicts() -> None:
    batch = {"input_ids": torch.arange(32).view(2, 16)}
    report = stabmon.check_attention_stability(gpt2(), batch, "bf16")
    for name in (
        "expected_logit_max",
        "curvature_bound",
        "precision_bits_needed",
        "float16_safe",
        "bfloat16_safe",
    ):
        assert report[name] is not None
    assert isinstance(report["recommendations"], list)
    assert report.to_markdown().startswith("#")


def test_an_analyzer_diagnoses_a_model_that_does_not_train() -> None:
    model = gpt2().eval()
    analyzer = stabmon.AttentionAnalyzer(model)
    with torch.no_grad():
        model(torch.arange(16)[None])
    assert set(analyzer.diagnose().stats) == {"transformer.h.0.attn", "transformer.h.1.attn"}
    with stabmon.AttentionAnalyzer(model) as analyzer:
        model(torch.arange(16)[None])
    assert analyzer.diagnose().stats


def test_the_analyses_hold_their_attributes() -> None:
    from stabmon.analysis import (
        attention_patterns,
        attention_rollout,
        compute_attention_attribution,
        simulate_cake,
    )

    model, batch = llama().eval(), {"input_ids": torch.arange(1, 25)[None]}
    attribution = compute_attention_attribution(model, batch)
    assert_fields(attribution, "attribution")
    rollout = attention_rollout(model, batch)
    assert rollout.matrix.shape == (1, 24, 24)
    assert rollout.targets is None
    assert rollout.first_token_share.shape == (1, 24)
    assert attention_rollout([torch.eye(4)] * 2).matrix.shape == (1, 4, 4)
    patterns = attention_patterns(model, batch)
    assert set(patterns.statistics) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    for role in patterns.roles:
        assert role.layer in patterns.statistics
        assert (type(role.head), type(role.role)) == (int, str)
        assert role.evidence
    assert (type(patterns.insights), type(patterns.recommendations)) == (list, list)
    cake = simulate_cake(model, batch, cache_size=12, window_size=4, max_new_tokens=3)
    for layer in cake.layers:
        for name in FIELDS["cake_layer"]:
            assert isinstance(getattr(layer, name), torch.Tensor)
    assert 0 < cake.compression_ratio < 1
    assert 0 < cake.eviction_frequency <= 1
    assert 0 < cake.budget_use <= 1
    assert cake.tokens.shape == (1, 3)
    assert cake.perplexity >= 1


@pytest.mark.parametrize("engine", ["dense", "blockwise", "fused", "auto"])
def test_each_signal_is_a_function_of_an_operator(engine: str) -> None:
    from stabmon.operator import attention_operator

    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(2, 4, 6, 8, generator=generator),
        torch.randn(2, 2, 6, 8, generator=generator),
    )
    operator = attention_operator(
        query,
        key,
        scale=8**-0.5,
        is_causal=True,
        mask=None,
        window=None,
        softcap=None,
        engine=engine,
    )
    for name in SIGNALS:
        assert pkgutil.resolve_name(f"stabmon.signals.{name}")(operator).shape[:2] == (2, 4)
    assert operator.log_partition(power=1).shape == (2, 4, 6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("info_density", {"form": "key_bias"}),
        ("info_density", {"form": "query_gain"}),
        ("info_density", {"form": "both"}),
        ("linearization", {}),
        ("linear_ramp", {}),
    ],
)
def test_a_controller_is_attached_and_detached(kind: str, options: dict[str, Any]) -> None:
    from stabmon.controllers import attach_controllers, detach_controllers

    model = llama().eval()
    before = model(torch.arange(8)[None]).logits
    controllers = attach_controllers(model, kind, **options)
    assert isinstance(controllers, torch.nn.ModuleDict)
    now = model(torch.arange(8)[None]).logits
    assert torch.allclose(now, before, atol=1e-5) == (kind == "info_density")
    detach_controllers(model)
    assert torch.equal(model(torch.arange(8)[None]).logits, before)
