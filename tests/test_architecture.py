"""Who may import whom, and what importing stabmon does: nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stabmon"
BELOW = {
    "records": {"plots"},
    "registry": set(),
    "operator": set(),
    "capture": {"records"},
    "signals": {"operator", "records", "registry"},
    "atomic": set(),
    "stored": {"records"},
    "rules": {"records", "registry", "signals", "stored"},
    "sinks": {"atomic", "records", "registry", "signals", "plots"},
    "interventions": {
        "atomic",
        "capture",
        "gradients",
        "operator",
        "optimizer_view",
        "records",
        "registry",
        "replay",
        "rules",
        "signals",
        "stored",
    },
    "optimizer_view": {"grad_scaler"},
    "plots": {"records", "signals", "sinks"},
    "check": {
        *(
            "capture",
            "gradients",
            "interventions",
            "losses",
            "measurements",
            "operator",
            "plots",
            "records",
            "replay",
            "signals",
        ),
        *("corpus", "recipe", "sinks", "trace"),
    },
    "analysis": {
        "atomic",
        "capture",
        "figures",
        "operator",
        "records",
        "registry",
        "signals",
        "sinks",
    },
    "figures": set(),
    "report": {"analysis", "figures", "plots", "sinks"},
    "controllers": {
        "atomic",
        "capture",
        "measurements",
        "operator",
        "plots",
        "records",
        "registry",
        "rules",
        "signals",
        "sinks",
    },
    "training": {"config", "controllers", "corpus", "monitor", "recipe"},
}
"""Part -> what it may import besides itself; whoever is not named here (the engine and its front
doors) may import anything.
"""
FRAMEWORKS = {"transformers", "lightning", "pytorch_lightning", "accelerate"}
LOGGERS = {"wandb", "mlflow", "tensorboard", "matplotlib"}
MAY_NAME_FRAMEWORKS = {
    "integrations",
    "capture",
    "check/pretrained.py",
    "training/models.py",
    "analysis/kv_cache/cache/stock_cache.py",
}
"""Parts, or single files."""


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Every module imported anywhere in a file, in full."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module}
    return names


def at_top(tree: ast.Module) -> set[str]:
    """Top-level packages imported when the module is."""
    found: set[str] = set()
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.split(".")[0] for name in imported(ast.Module([node], []))}
        for inner in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                waiting += getattr(node, inner, [])
    return found


def violations(path: Path, source: str) -> list[str]:
    """What a file of the package imports and must not."""
    tree, part = ast.parse(source), part_of(path)
    wrong = []
    if part in BELOW:
        parts = {name.split(".")[1] for name in imported(tree) if name.startswith("stabmon.")}
        wrong += [f"{path.name} imports stabmon.{name}" for name in parts - BELOW[part] - {part}]
    wrong += [f"{path.name} imports {name} at the top" for name in at_top(tree) & LOGGERS]
    if not MAY_NAME_FRAMEWORKS & {part, str(path.relative_to(PACKAGE))}:
        names = {name.split(".")[0] for name in imported(tree)}
        wrong += [f"{path.name} imports {name}" for name in names & FRAMEWORKS]
    return wrong


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_point_one_way(path: Path) -> None:
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("where", "planted"),
    [
        ("operator/fused.py", "from stabmon.signals import SIGNALS"),
        ("signals/entropy.py", "def f():\n    import stabmon.rules"),
        ("rules/loss_spike.py", "import lightning"),
        ("check/source.py", "import transformers"),
        ("check/report.py", "from stabmon.engine.monitor import AttentionStabilityMonitor"),
        ("sinks/wandb.py", "import wandb"),
        ("monitor.py", "try:\n    import mlflow\nexcept ImportError:\n    pass"),
    ],
)
def test_a_planted_violation_is_caught(where: str, planted: str) -> None:
    assert violations(PACKAGE / where, planted)


def test_importing_stabmon_loads_no_option_and_patches_nothing() -> None:
    code = """
import sys, torch, torch.nn.functional as F
before = dict(vars(F)), dict(vars(torch.nn.Module)), torch.get_rng_state()
import stabmon, stabmon.cli
after = dict(vars(F)), dict(vars(torch.nn.Module)), torch.get_rng_state()
assert before[0] == after[0] and before[1] == after[1] and torch.equal(before[2], after[2])
optional = {"transformers", "lightning", "wandb", "mlflow", "tensorboard", "matplotlib"} & set(sys.modules)
assert not optional, optional
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
