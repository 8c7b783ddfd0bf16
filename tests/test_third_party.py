"""Check that leaves of another package are found, chosen, applied, undone and resumed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_runs import lines

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
EXTRA = Path(__file__).parent / "support" / "third_party"
LAYER, FAULT = "transformer.h.0.attn", 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def facts(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Install the package with pip, and train with it in a process of its own."""
    source, installed = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "wheel_backend.py", "extra_leaves.py"):
        shutil.copy(EXTRA / name, source)
    alone = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(*("-m", "pip", "install", "-q", *alone, "--target", str(installed), str(source)))
    paths = [str(installed), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    said = run("-m", "tests.support.third_party_run", str(folder), environment=environment)
    return json.loads(said.splitlines()[-1])


def run(*arguments: str, environment: dict[str, str] | None = None) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_leaf_is_listed(facts: dict[str, Any]) -> None:
    assert facts["status"] == 0
    expected = {
        "signals": "peak_share",
        "rules": "peaked",
        "interventions": "flatten",
        "controllers": "steady",
        "sinks": "tally",
        "evictions": "oldest",
    }
    assert expected.keys() == facts["listed"].keys()
    for kind, name in expected.items():
        assert facts["listed"][kind][name]


def test_its_rule_alarms_and_guard_applies_its_intervention(
    facts: dict[str, Any], folder: Path
) -> None:
    assert [FAULT, "peaked", LAYER] in facts["issues"]
    assert facts["applied"] == [["flatten", FAULT, True]]
    assert facts["errors"] == facts["resumed_errors"] == {}
    audit = lines(folder / "stabmon" / "interventions.jsonl")
    applied, undone = (
        [each for each in audit if each["action"] == action] for action in ("applied", "undone")
    )
    assert [(each["intervention"], each["step"], each["layer"]) for each in applied] == [
        ("flatten", FAULT, LAYER)
    ]
    assert applied[0]["issue_type"] == "peaked"
    assert [each["intervention"] for each in undone] == ["flatten"]


def test_its_signal_falls_once_its_intervention_is_applied(
    facts: dict[str, Any], folder: Path
) -> None:
    readings = lines(folder / "stabmon" / "readings.jsonl")
    shares = [each["layers"][LAYER]["peak_share"] for each in readings]
    assert len(shares) == FAULT + 3
    means = [sum(each) / len(each) for each in shares]
    assert means[FAULT - 1] > 0.9 > 2 * max(means[FAULT:])


def test_its_sink_receives_readings_issues_and_interventions(
    facts: dict[str, Any], folder: Path
) -> None:
    told = [tuple(each) for each in lines(folder / "stabmon" / "tally.jsonl")]
    assert [step for kind, step in told if kind == "reading"] == [1, 2, 3, 4, 5, 6]
    assert ("issue peaked", FAULT) in told
    assert ("applied flatten", FAULT) in told


def test_its_intervention_is_undone_and_resumed_from_a_state(facts: dict[str, Any]) -> None:
    assert facts["exact"]
    assert facts["undone"]
    assert facts["resumed"] == [["flatten", FAULT, True]]
    assert facts["undone_after_resume"]


def test_its_controller_and_its_policy_are_used_by_name(facts: dict[str, Any]) -> None:
    assert facts["controlled"]
    assert facts["policy"] == "oldest"
