"""Resume the checkpoints of earlier versions: everything that guard held is in force again."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import stabmon
from tests.states.make import (
    BY_HAND,
    FACTOR,
    HELD,
    JUMP,
    RATE,
    SAVED,
    TEMPERATURE,
    TRAIN,
    Hooks,
    make,
    make_model,
    optimizer_of,
    query_key,
)
from tests.support.small_runs import clean, lines, same_bits, weights

pytestmark = pytest.mark.filterwarnings("ignore")
STATES = Path(__file__).parents[1] / "states"
STORED = {"transformers": STATES / "transformers_1", "lightning": STATES / "lightning_1.ckpt"}
SCALE = 8**-0.5
"""By which GPT-2 multiplies scores at a head's width of 8."""
GROWTH = 1.06
"""Factor on queries and keys in one step: too little for an alarm, enough for what is held."""
HELD_STEPS = range(SAVED + 1, SAVED + 4)
FREE_STEPS = range(SAVED + 8, SAVED + 11)
"""Steps in which queries and keys grow: while everything is held, and after it was undone."""
UNDO = {
    SAVED + 3: "lower_learning_rate",
    SAVED + 4: "cap_learning_rate",
    SAVED + 5: "soften_logits",
    SAVED + 6: "cap_query_key_norm",
    SAVED + 7: "qk_clip",
    SAVED + 11: "skip_step",
}
LAST = SAVED + 12


class Resumed(Hooks):
    """Prove that each intervention is in force, and that it is not after its undo.

    Scheduled rates are 40 times ``RATE`` for two steps, which the cap alone brings down, and then
    1.6 times, which the person's factor brings below the cap. Gradients of the last two steps are
    NaN.
    """

    def __init__(self) -> None:
        self.monitor: Any = None
        self.poisoned = False
        self.begun: dict[str, Any] = {}
        self.diagnoses: dict[int, Any] = {}
        self.rates: dict[int, float] = {}
        self.scales: dict[int, list[float]] = {}
        """The scales of both layers in the step's forward."""
        self.used: dict[int, float] = {}
        self.stepped: dict[int, list[float]] = {}
        """Norms of each layer's queries and keys after the optimizer's step."""
        self.left: dict[int, list[float]] = {}
        """The same after stabmon has judged the step, before anything is undone."""
        self.kept_weights: dict[int, bool] = {}
        self.undone: dict[str, list[float]] = {}
        """The same norms right after an undo."""

    def rate(self, step: int) -> float:
        return 1.0 if step < JUMP else 40.0 if step < SAVED + 3 else 1.6

    def resumed(self, stability: Any, model: Any) -> None:
        self.monitor = stability.monitor
        on_step = self.monitor.on_step

        def noted(*args: Any) -> Any:
            diagnosis = on_step(*args)
            self.diagnoses[self.monitor.step] = diagnosis
            return diagnosis

        self.monitor.on_step = noted
        bias = model.transformer.ln_f.bias
        bias.register_hook(lambda grad: grad * float("nan") if self.poisoned else grad)
        self.begun = {
            "step": self.monitor.step,
            "issues": [issue.to_dict() for issue in stability.issues],
            "open": [issue.to_dict() for issue in self.monitor.open_issues],
            "held": {a.intervention.name: a.step for a in self.monitor.applied if a.active},
        }
        for layer, block in enumerate(model.transformer.h):
            block.attn.register_forward_pre_hook(
                lambda module, _, layer=layer: self.used.__setitem__(layer, module.scaling)
            )

    def before_optimizer(self, step: int, model: Any) -> None:
        self.before = weights(model)
        self.gradient = model.transformer.ln_f.bias.grad

    def after_optimizer(self, step: int, model: Any) -> None:
        moved = model.transformer.ln_f.bias.detach() - self.before["transformer.ln_f.bias"]
        if self.gradient is not None:
            self.rates[step] = (moved.norm() / self.gradient.norm()).item()
        self.kept_weights[step] = same_bits(self.before, weights(model))
        if step in (*HELD_STEPS, *FREE_STEPS):
            for layer in (0, 1):
                query_key(model, layer).mul_(GROWTH)
        self.stepped[step] = norms(model)

    def after_step(self, step: int, model: Any, stability: Any) -> None:
        self.left[step] = norms(model)
        self.scales[step] = [self.used[0], self.used[1]]
        self.poisoned = step >= LAST - 2
        if step in UNDO:
            before = query_key(model, 0).clone()
            named = [a for a in self.monitor.applied if a.intervention.name == UNDO[step]]
            assert [each.active for each in named] == [True]
            named[0].undo()
            assert not named[0].active
            self.undone[UNDO[step]] = norms(model)
            query_key(model, 0).copy_(before)  # else its scores are again those of the fault


def norms(model: Any) -> list[float]:
    return [query_key(model, layer).norm().item() for layer in (0, 1)]


def saved_state(framework: str, path: Path) -> dict[str, Any]:
    """Read the monitor's state from a checkpoint."""
    if framework == "transformers":
        return json.loads((path / "stabmon_state.json").read_text())
    return torch.load(path, weights_only=True)["callbacks"]["StabilityCallback"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints that this version writes of the same run."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module", params=[*(f"{name} 1" for name in TRAIN), *TRAIN])
def run(request: Any, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Resume a stored checkpoint, or one that this version wrote, through its own framework."""
    framework, _, stored = request.param.partition(" ")
    folder = tmp_path_factory.mktemp("resumed")
    path = (STORED if stored else made)[framework]
    given = saved_state(framework, path)
    if framework == "transformers":
        path = Path(shutil.copytree(path, folder / f"checkpoint-{SAVED}"))
    hooks = Resumed()
    stability = TRAIN[framework](folder, hooks, LAST, resume=path)
    return hooks, stability, given, folder


def test_steps_issues_and_interventions_go_on(run: Any) -> None:
    hooks, stability, given, _ = run
    begun = hooks.begun
    assert begun["step"] == given["step"] == SAVED
    assert begun["held"] == HELD
    assert len(begun["issues"]) >= 10
    assert json.dumps(begun["issues"]) == json.dumps(given["issues"])
    opened = [each["issue"] for each in given["tracker"]["open"]]
    assert {each["issue_type"] for each in begun["open"]} >= {"entropy_collapse", "update_spike"}
    assert sorted(map(json.dumps, begun["open"])) == sorted(map(json.dumps, opened))
    assert stability.monitor.step == LAST
    assert not stability.monitor.errors


def test_the_history_goes_on(run: Any) -> None:
    first = run[0].diagnoses[SAVED + 1]
    assert [reading.step for reading in first.readings] == list(range(1, SAVED + 2))
    assert all(len(reading.layers) == 2 for reading in first.readings)


def test_rates_are_held_until_each_undo(run: Any) -> None:
    expected = {
        SAVED + 1: RATE,  # of 40 times as much, by the cap
        SAVED + 2: RATE,
        SAVED + 3: 1.6 * RATE * FACTOR,
        SAVED + 4: RATE,  # without the factor, by the cap
        SAVED + 5: 1.6 * RATE,
        SAVED + 6: 1.6 * RATE,  # what a person took back, guard does not do again
    }
    assert {step: run[0].rates[step] for step in expected} == pytest.approx(expected, rel=0.02)


def test_the_temperature_is_held_until_its_undo(run: Any) -> None:
    hooks = run[0]
    scales = [hooks.scales[step] for step in range(SAVED + 1, LAST)]
    assert scales == [[SCALE, SCALE / TEMPERATURE]] * 5 + [[SCALE, SCALE]] * (len(scales) - 5)


def test_the_norm_is_capped_until_its_undo(run: Any) -> None:
    hooks = run[0]
    for step in HELD_STEPS:
        assert hooks.left[step][1] == pytest.approx(hooks.stepped[step][1] / GROWTH, rel=0.005)
    for step in FREE_STEPS:
        assert hooks.left[step][1] == hooks.stepped[step][1]


def test_scores_are_clipped_until_the_undo(run: Any) -> None:
    hooks = run[0]
    held = range(SAVED + 1, SAVED + 8)
    assert math.prod(hooks.left[step][0] / hooks.stepped[step][0] for step in held) < 0.95
    assert max(score(hooks, step) for step in range(SAVED + 1, FREE_STEPS[0])) < 13
    assert hooks.undone["qk_clip"][0] > 2 * hooks.left[SAVED + 7][0], "factors are divided out"
    assert [hooks.left[step][0] for step in FREE_STEPS] == [hooks.stepped[s][0] for s in FREE_STEPS]
    assert score(hooks, SAVED + 11) > 10


def score(hooks: Resumed, step: int) -> float:
    """Return the largest score of the first layer at a step."""
    return max(next(iter(hooks.diagnoses[step].stats.values()))["max_logit"])


def test_gradients_that_are_not_finite_are_skipped_until_the_undo(run: Any) -> None:
    hooks = run[0]
    assert [step for step, kept in hooks.kept_weights.items() if kept] == [LAST - 1]
    assert math.isnan(hooks.rates[LAST])


def test_each_is_undone_once_and_nothing_stays_behind(run: Any) -> None:
    hooks, stability, _, folder = run
    assert hooks.undone.keys() == HELD.keys()
    audit = lines(folder / "stabmon" / "interventions.jsonl")
    undone = [each["intervention"] for each in audit if each["action"] == "undone"]
    assert undone == list(UNDO.values())
    assert clean(stability.monitor.model)


@pytest.mark.parametrize("framework", STORED)
def test_a_stored_state_is_taken_up_in_a_loop_of_ones_own(framework: str) -> None:
    model = make_model()
    if framework == "lightning":
        inner, model = model, torch.nn.Module()
        model.model, model.forward = inner, inner.forward
    optimizer, _ = optimizer_of(model, Hooks())
    with stabmon.AttentionStabilityMonitor(model, optimizer, config="guard", sinks=[]) as monitor:
        monitor.load_state_dict(saved_state(framework, STORED[framework]))
        assert {each.intervention.name: each.step for each in monitor.applied} == HELD
        assert all(each.active for each in monitor.applied)
        assert [each.by_user for each in monitor.applied] == [s == BY_HAND for s in HELD.values()]
        again = json.loads(json.dumps(monitor.state_dict()))
        assert again["step"] == SAVED
    assert not monitor.errors
    assert clean(model)


def test_stored_states_are_small() -> None:
    files = [*STORED["transformers"].iterdir(), STORED["lightning"]]
    assert all(path.stat().st_size < 100_000 for path in files)
