"""After a clip the head's largest score is tau, and nobody else's moved: on every layout of weights
that models are written in.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from stabmon.interventions import NotApplicable, TrainingRun
from stabmon.interventions.effects.score_clip import ScoreClip
from stabmon.interventions.qk_clip import QkClip
from stabmon.interventions.run.score_targets import baselines
from stabmon.records import Reading
from stabmon.rules.tracking.history import History
from tests.support.attention_zoo import HAND_WRITTEN, HEADS, WIDTH, noise
from tests.support.intervention_runs import (
    ZOO,
    all_bits,
    differences,
    first_layer,
    growth,
    make_run,
    run_of,
    scores_of,
    train_step,
)

PER_HEAD = [
    *(
        "gpt2-sdpa",
        "gpt2_layer_scaled-sdpa",
        "llama-sdpa",
        "mistral-sdpa",
        "qwen2-sdpa",
        "gemma2-eager",
        "gpt_neox-sdpa",
    ),
    *(
        "gpt_oss-eager",
        "deepseek_v3-sdpa",
        "opt-sdpa",
        "falcon-sdpa",
        "falcon_alibi-sdpa",
        "bert-sdpa",
        "t5-sdpa",
        "vit-sdpa",
    ),
    *(
        "whisper-sdpa",
        "bloom",
        "gptj",
        "mpt",
        "transformer_encoder",
        "multihead-fused",
        "multihead-weights",
    ),
    *(f"hand_written-{how}" for how in HAND_WRITTEN if how != "cosine" and "flex" not in how),
]
SHARED_GAIN = ["qwen3-sdpa", "gemma3-sdpa"]


@pytest.mark.parametrize("name", PER_HEAD)
def test_the_head_comes_to_tau_and_the_others_stay_bit_for_bit(name: str) -> None:
    run = run_of(name)
    for layer in run.layers:
        before = scores_of(run)[layer]
        tau = float(before[1]) / 7
        applied = QkClip(target=tau, hold=False).apply(run, growth(layer))
        after = scores_of(run)[layer]
        assert after[1] == pytest.approx(tau, rel=1e-5)
        others = [head for head in range(len(before)) if head != 1]
        assert (after[others] == before[others]).all()
        assert "proven" in applied.record["note"]
        assert applied.undo()


@pytest.mark.parametrize("name", SHARED_GAIN)
def test_behind_a_norm_whose_gain_all_heads_share_the_whole_layer_is_scaled_and_the_record_says_so(
    name: str,
) -> None:
    run = run_of(name)
    layer = first_layer(run)
    before = scores_of(run)[layer]
    weights = {n: p.clone() for n, p in run.model.named_parameters() if "proj" in n}
    applied = QkClip(target=float(before[1]) / 5, hold=False).apply(run, growth(layer))
    np.testing.assert_allclose(scores_of(run)[layer], before / 5, rtol=1e-5)
    assert "all heads scaled alike" in applied.record["note"]
    assert all(torch.equal(p, weights[n]) for n, p in run.model.named_parameters() if n in weights)


class Normed(nn.Module):
    """Hand-written attention behind a norm of queries and keys: per head [H, D], over all heads [H
    * D], or without a gain.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.num_heads = kind, HEADS
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        if kind == "stacked":
            self.q_layernorm = nn.Module()
            self.q_layernorm.norms = nn.ModuleList(
                nn.LayerNorm(WIDTH // HEADS) for _ in range(HEADS)
            )
        elif kind == "wide":
            self.q_norm, self.k_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        else:
            self.q_norm = nn.RMSNorm(WIDTH // HEADS, elementwise_affine=kind != "no gain")
            self.k_norm = nn.RMSNorm(WIDTH // HEADS, elementwise_affine=kind != "no gain")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.kind == "wide":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        if self.kind == "stacked":
            q = torch.stack(
                [norm(q[:, head]) for head, norm in enumerate(self.q_layernorm.norms)], dim=1
            )
        elif self.kind != "wide":
            q, k = self.q_norm(q), self.k_norm(k)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).flatten(-2)


class One(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x)


@pytest.mark.parametrize("kind", ["stacked", "wide"])
def test_a_norm_with_a_gain_for_each_head_is_scaled_for_that_head_alone(kind: str) -> None:
    torch.manual_seed(0)
    run = make_run(One(Normed(kind)), {"x": noise(2, 12, WIDTH)})
    before = scores_of(run)["attention"]
    QkClip(target=float(before[2]) / 4, hold=False).apply(run, growth("attention", 2))
    after = scores_of(run)["attention"]
    assert after[2] == pytest.approx(before[2] / 4, rel=1e-5)
    assert (np.delete(after, 2) == np.delete(before, 2)).all()


@pytest.mark.parametrize(
    ("build", "reason"), [("no gain", "no gain"), ("cosine", "does not scale")]
)
def test_where_no_weight_scales_the_scores_it_refuses_and_leaves_every_bit_alone(
    build: str, reason: str
) -> None:
    run = (
        make_run(One(Normed(build)), {"x": noise(2, 12, WIDTH)})
        if build == "no gain"
        else run_of("hand_written-cosine")
    )
    layer, before = first_layer(run), all_bits(run)
    with pytest.raises(NotApplicable, match=reason) as error:
        QkClip(target=0.01).apply(run, growth(layer))
    assert "rms_norm" in error.value.advice
    assert differences(before, all_bits(run)) == []
    assert run.applied == []
    assert not run.step_hooks.wants("attention")


class Swapped(nn.Module):
    """A fused projection whose order its name misleads about: called like GPT-NeoX's, ordered like
    GPT-2's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in self.query_key_value(x).chunk(3, dim=-1)
        )
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def swapped() -> tuple[One, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return One(Swapped()), {"x": noise(2, 12, WIDTH)}


def test_a_misleading_name_is_found_out_on_the_batch_and_the_right_order_is_taken() -> None:
    run = make_run(*swapped())
    before = scores_of(run)["attention"]
    applied = QkClip(target=float(before[1]) / 4, hold=False).apply(run, growth("attention"))
    assert scores_of(run)["attention"][1] == pytest.approx(before[1] / 4, rel=1e-5)
    assert "in turn" in applied.record["note"]


def test_without_a_batch_no_clip_is_judged_until_its_rows_have_shrunk_in_vain() -> None:
    run = make_run(*swapped())
    run.forwards = []
    weight = run.model.attention.query_key_value.weight
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    before = weight.detach().clone()
    applied = QkClip(target=float(scores_of(run)["attention"][1]) / 3).apply(
        run, growth("attention")
    )
    assert "not judged" in applied.record["note"]
    left = []
    for _ in range(10):
        train_step(run)
        left.append(weight.norm().item())
        if applied.effect.abandoned_reason:
            break
    assert "not those of its heads" in applied.effect.abandoned_reason
    assert len(left) > 4, "a third of the score, once, is no reason"
    assert left[-1] == left[-2] == left[-3], "in doubt it is not clipped further"
    assert applied.undo()
    assert torch.equal(weight, before)


def test_without_a_batch_a_clip_of_the_right_rows_is_held_on() -> None:
    run = run_of("llama-sdpa")
    run.forwards = []
    layer = first_layer(run)
    tau = float(scores_of(run)[layer][1]) / 100
    applied = QkClip(target=tau).apply(run, growth(layer))
    for _ in range(6):
        with torch.no_grad():
            run.layers[layer].q_proj.weight.mul_(1.5)
        train_step(run)
    assert not applied.effect.abandoned_reason
    assert scores_of(run)[layer][1] <= tau * 1.6


def test_several_calls_of_one_module_are_clipped_by_the_one_that_needs_it_most() -> None:
    run = run_of("albert-sdpa")
    first, second = list(run.layers)[:2]
    assert second == f"{first}#1"
    before = scores_of(run)
    act = QkClip(target=float(before[second][1]) / 4, hold=False).aimed_at(
        [growth(first), growth(second)]
    )
    act.apply(run)
    worst = max(before[first][1], before[second][1])
    assert scores_of(run)[first][1] == pytest.approx(
        before[first][1] * before[second][1] / 4 / worst, rel=1e-5
    )


def test_a_head_that_was_saturated_from_the_start_begins_anew_and_may_grow_from_there() -> None:
    run = run_of("llama-sdpa")
    layer = first_layer(run)
    before = scores_of(run)[layer]
    applied = QkClip(fresh=before[1] / 100, floor=before[1] / 4, widest=before[1] / 2).apply(
        run, growth(layer, from_the_start=True)
    )
    assert scores_of(run)[layer][1] == pytest.approx(before[1] / 100, rel=0.01)
    assert isinstance(applied.effect, ScoreClip)
    assert applied.effect.targets == {(layer, 1): before[1] / 2}
    bits = all_bits(run)
    run.step_hooks.fire("on_step")
    assert differences(bits, all_bits(run)) == [], "it is below what it may come to"


def test_a_held_clip_keeps_a_head_at_tau_that_grows_at_every_step() -> None:
    run = run_of("llama-sdpa")
    layer = first_layer(run)
    attention = run.layers[layer]
    tau = float(scores_of(run)[layer][1]) / 2
    applied = QkClip(target=tau).apply(run, growth(layer))
    for _ in range(5):
        with torch.no_grad():
            attention.q_proj.weight.mul_(1.5)
        train_step(run)
        run.optimizer.zero_grad()
        assert scores_of(run)[layer][1] <= tau * 1.6
    assert run.records[1:] == [], "told once a sampled step, not at each"
    applied.release()
    (again, released) = run.records[1:]
    assert (again["action"], released["action"]) == ("again", "released")
    assert again["after"]["clips"] == {f"{layer} head 1": 5}
    assert again["after"]["factor"][f"{layer} head 1"] == pytest.approx(1.5**-5, rel=0.3)


def grow_to(run: TrainingRun, layer: str, score: float) -> None:
    """Set the largest score of head 1, by its rows of W_q."""
    width = run.layers[layer].head_dim
    with torch.no_grad():
        run.layers[layer].q_proj.weight[width : 2 * width] *= score / scores_of(run)[layer][1]


def test_a_target_stays_while_its_head_would_have_doubled_its_score() -> None:
    run = run_of("llama-sdpa")
    layer = first_layer(run)
    run.optimizer.param_groups[0]["lr"] = 0.0
    applied = QkClip(floor=0.01, times_own_past=1e-9).apply(run, growth(layer, since_step=0))
    held = applied.effect
    assert isinstance(held, ScoreClip)
    for times, target in ((1.3, 0.01), (1.2, 0.02)):
        for _ in range(3):
            grow_to(run, layer, times * held.targets[layer, 1])
            train_step(run)
        applied.relax()
        assert held.targets[layer, 1] == target, f"after three steps that grew {times} times"


def test_all_heads_are_held_at_their_past_from_before_the_first_of_them_grew() -> None:
    run = run_of("llama-sdpa")
    first, second = list(run.layers)[:2]
    now = {name: values["max_logit"] for name, values in run.history.latest.layers.items()}
    history = History()
    for step, times in ((1, 0.1), (2, 0.1), (3, 0.5), (4, 1.0)):
        layers = {name: {"max_logit": times * values} for name, values in now.items()}
        history.add(Reading(step, None, layers, info=run.history.info))
    run.history = history
    alarm = growth(first, since_step=2)
    applied = QkClip(floor=1e-6, heads="all").apply(run, alarm)
    np.testing.assert_allclose(scores_of(run)[first], 0.2 * now[first], rtol=1e-5)
    for layer in (first, second):
        for head, score in enumerate(now[layer]):
            after = applied.record["after"]["max_logit"][f"{layer} head {head}"]
            assert after == pytest.approx(0.2 * score), "twice a tenth of what it is now"
    again = QkClip(floor=1e-6, heads="all").apply(run, replace(alarm, step=9, evidence={}))
    assert not applied.active, "one clip of all heads at a time"
    halved = pytest.approx(0.1 * now[second][0])
    assert again.effect.targets[second, 0] == halved, "held at its target, it alarmed again"


def test_a_step_changes_a_held_layer_by_no_more_than_its_share() -> None:
    run = run_of("llama-sdpa")
    first, second = list(run.layers)[:2]
    QkClip(target=0.01, step_share=0.001).apply(run, growth(first))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    train_step(run)

    def moved(layer: str) -> float:
        names = [f"{layer}.{part}.weight" for part in ("q_proj", "k_proj")]
        now = dict(run.model.named_parameters())
        change = torch.stack([(now[n] - before[n]).norm() for n in names]).norm()
        return float(change.detach() / torch.stack([before[n].norm() for n in names]).norm())

    assert moved(second) > 0.01 > moved(first)


@pytest.mark.parametrize(
    ("settings", "kind", "targets"),
    [
        ({"floor": 0.01, "widest": 0.05}, "logit_growth", [0.01, 0.02, 0.04, 0.05, 0.05]),
        ({"floor": 0.01, "widest": 0.0}, "logit_growth", [0.01, 0.01]),
        ({"target": 0.01, "widest": 0.05}, "logit_growth", [0.01, 0.01]),
        ({"floor": 0.01, "widest": 0.05}, "precision_insufficient", [0.01, 0.01]),
    ],
)
def test_what_is_held_without_an_alarm_is_held_less_tightly_unless_a_limit_says_otherwise(
    settings: dict[str, float], kind: str, targets: list[float]
) -> None:
    run = run_of("llama-sdpa")
    layer = first_layer(run)
    alarm = replace(growth(layer, times_own_past=1e6), issue_type=kind, value=50.0, threshold=1.0)
    applied = QkClip(**settings).apply(run, alarm)
    held = applied.effect
    assert isinstance(held, ScoreClip)
    run.optimizer.param_groups[0]["lr"] = 0.0
    found = []
    for _ in targets:
        found.append(held.targets[layer, 1])
        grow_to(run, layer, 1.3 * held.targets[layer, 1])
        train_step(run)
        applied.relax()
    assert found == pytest.approx(targets)
    told = [record for record in run.records if record["action"] == "relaxed"]
    assert len(told) == len(set(targets)) - 1
    assert ScoreClip(run, {}).relax() == {}
    assert (
        QkClip(**settings).resume(run, applied.state_dict()).effect.state_dict()["aims"]
        == held.state_dict()["aims"]
    )


@pytest.mark.parametrize(
    "scores", [[-3.0, -2.0], [float("nan"), float("nan")], [float("inf"), float("inf")]]
)
def test_scores_that_are_negative_or_not_finite_are_never_clipped(scores: list[float]) -> None:
    run = run_of("gpt2-sdpa")
    run.forwards = []
    layer = first_layer(run)
    run.history.latest.layers[layer]["max_logit"][:2] = scores
    run.history.add(run.history.latest)
    with pytest.raises(NotApplicable, match="nothing to clip"):
        QkClip(target=1.0).aimed_at([growth(layer, 0), growth(layer, 1)]).apply(run)


def test_masters_in_full_precision_are_clipped_with_the_weights_they_overwrite() -> None:
    model, inputs = ZOO["llama-sdpa"]()
    model = model.bfloat16()
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    start = [m.detach().clone() for m in masters]
    run = make_run(model, inputs, None)
    run.optimizer = torch.optim.AdamW(masters)
    layer = first_layer(run)
    before = scores_of(run)[layer]
    applied = QkClip(target=float(before[1]) / 4, hold=False).apply(run, growth(layer))
    for parameter, master in zip(model.parameters(), masters, strict=True):
        torch.testing.assert_close(master.bfloat16(), parameter, rtol=0.01, atol=0)
    assert scores_of(run)[layer][1] == pytest.approx(before[1] / 4, rel=0.02)
    with torch.no_grad():
        for parameter, master in zip(model.parameters(), masters, strict=True):
            parameter.copy_(master)  # what such an optimizer does after its step
    assert scores_of(run)[layer][1] == pytest.approx(before[1] / 4, rel=0.02)
    assert applied.undo()
    assert all(torch.equal(m, s) for m, s in zip(masters, start, strict=True))


def test_flattened_masters_that_cannot_be_told_apart_are_refused() -> None:
    model, inputs = ZOO["llama-sdpa"]()
    run = make_run(model, inputs, None)
    run.optimizer = torch.optim.AdamW(
        [nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))]
    )
    before = all_bits(run)
    with pytest.raises(NotApplicable, match="steps this parameter"):
        QkClip(target=0.1).apply(run, growth(first_layer(run)))
    assert differences(before, all_bits(run)) == []


def test_frozen_and_adapted_projections_are_refused() -> None:
    run = run_of("llama-sdpa")
    layer = first_layer(run)
    run.layers[layer].q_proj.weight.requires_grad_(False)
    with pytest.raises(NotApplicable, match="frozen"):
        QkClip(target=0.1).apply(run, growth(layer))


def test_moments_are_left_alone() -> None:
    run = run_of("gpt2-sdpa", steps=2)
    layer = first_layer(run)
    moments = {k: v for k, v in all_bits(run).items() if k.startswith("state")}
    QkClip(target=float(scores_of(run)[layer][1]) / 4).apply(run, growth(layer))
    assert moments
    assert (
        differences(moments, {k: v for k, v in all_bits(run).items() if k.startswith("state")})
        == []
    )


def test_after_training_has_gone_on_undo_divides_the_factor_out_and_says_that_it_is_not_exact() -> (
    None
):
    run = run_of("gpt2-sdpa")
    layer = first_layer(run)
    before = run.layers[layer].c_attn.weight.detach().clone()
    applied = QkClip(target=float(scores_of(run)[layer][1]) / 4, hold=False).apply(
        run, growth(layer)
    )
    clipped = run.layers[layer].c_attn.weight.detach().clone()
    train_step(run)
    step = run.layers[layer].c_attn.weight.detach() - clipped
    assert not applied.undo()
    torch.testing.assert_close(
        run.layers[layer].c_attn.weight[:, 8:16], before[:, 8:16] + 2 * step[:, 8:16]
    )


def with_scores(run: TrainingRun, layer: str, head: int, scores: list[float]) -> None:
    """A history in which one head's largest score took this course."""
    newest = run.history.latest
    run.history = History()
    for step, score in enumerate(scores, 1):
        values = newest.layers[layer]["max_logit"].copy()
        values[head] = score
        run.history.add(Reading(step, 1.0, {layer: {"max_logit": values}}, newest.info))


def test_tau_is_twice_the_heads_own_past_and_no_lower_than_the_floor_and_no_higher_than_the_format() -> (
    None
):
    run = run_of("gpt2-sdpa")
    layer = first_layer(run)
    with_scores(run, layer, 1, [3, 20, 21, 22, 21, 20, 100])
    jumped = growth(layer, times_own_past=100 / 22)
    assert baselines(run, jumped) == 22.0
    assert QkClip().aim(run, jumped) == 44.0
    assert QkClip(target=3.0).aim(run, jumped) == 3.0
    assert QkClip(times_own_past=1).aim(run, jumped) == 22.0
    with_scores(run, layer, 1, [3, 4, 4.2, 100])
    floored = growth(layer, times_own_past=10.0)  # rules count scores below 10 as 10
    assert baselines(run, floored) == 4.2
    assert QkClip().aim(run, floored) == 10.0
    info = run.history.info[layer]
    run.history.info[layer] = type(info)(info.heads, 64, 0.125, "float16")
    assert QkClip(times_own_past=1e5).aim(run, floored) == 65504 / 4 * 0.125


@pytest.mark.parametrize(
    ("scores", "past"),
    [
        ([2, 3, 30, 60, 100], 3.0),  # that it has grown more slowly since is no past
        ([18, 20, 19, 21, 20, 30, 50, 90, 170], 21.0),
        ([3, 6, 9, 12, 15, 18, 20, 22, 200], 22.0),  # slow growth, then a jump
        ([80, 90, 90, 95, 100], 80.0),
    ],
)
def test_the_past_ends_at_the_knee_of_the_scores_course(scores: list[float], past: float) -> None:
    run = run_of("gpt2-sdpa")
    layer = first_layer(run)
    with_scores(run, layer, 1, scores)
    assert baselines(run, growth(layer)) == past
    assert np.isnan(baselines(run, growth("nowhere")))


def test_several_layers_are_clipped_and_proven_each_by_itself_and_one_that_does_not_fit_is_left_out() -> (
    None
):
    run = run_of("gpt2-sdpa")
    first, second = run.layers
    before = scores_of(run)
    run.layers[second].c_attn.weight.requires_grad_(False)
    issues = [growth(layer, head) for layer in (first, second) for head in range(4)]
    targets = 0.3 * float(min(before[first].min(), before[second].min()))
    applied = QkClip(target=targets, hold=False).aimed_at(issues).apply(run)
    np.testing.assert_allclose(scores_of(run)[first], targets, rtol=1e-5)
    assert "left out: c_attn is frozen" in applied.record["note"]
    applied.undo()
    run.layers[second].c_attn.weight.requires_grad_(True)
    applied = QkClip(target=targets, hold=False).aimed_at(issues).apply(run)
    np.testing.assert_allclose(scores_of(run)[first], targets, rtol=1e-5)
    assert "left out" not in applied.record["note"]
    assert len(applied.record["places"]) == 8


def test_unknown_layers_and_nameless_heads_are_refused_in_a_sentence() -> None:
    run = run_of("gpt2-sdpa")
    with pytest.raises(NotApplicable, match="no head is named"):
        QkClip().apply(run)
    with pytest.raises(NotApplicable, match=r"nowhere"):
        QkClip().apply(run, growth("nowhere"))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"qk_clip\.target: -1"):
        QkClip(target=-1)
