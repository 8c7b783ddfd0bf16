"""The README's code as a reader would type it."""

import math
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from torch import nn
from torch.utils.data import DataLoader

from tests.support.small_runs import VOCABULARY, Tokens, gpt2

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Every fenced block of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def train_step(
    model: nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    """Forward, backward, optimizer.step."""
    loss: torch.Tensor = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def names(folder: Path, ill: bool) -> dict[str, Any]:
    """What the README takes as given: real, and small; ``ill``: with a NaN, so that there is
    something to print.
    """
    from transformers import TrainingArguments

    model = gpt2(n_positions=256)
    if ill:
        with torch.no_grad():
            model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for batch in DataLoader(Tokens(50), 1):
                model(**batch)

    options: dict[str, Any] = {
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "max_steps": 3,
    }
    return {
        "model": model,
        "args": TrainingArguments(str(folder / "out"), **options),
        "data": Tokens(32),
        "optimizer": optimizer,
        "loader": DataLoader(Tokens(12), 4),
        "train_step": lambda model, batch: train_step(model, batch, optimizer),
        "train": train,
        "batch": {"input_ids": torch.arange(320).reshape(2, 160) % VOCABULARY},
        "input_ids": torch.arange(320).reshape(2, 160) % VOCABULARY,
    }


@pytest.mark.parametrize(
    "block", blocks("python"), ids=lambda block: block.strip().splitlines()[-1][:40]
)
def test_a_block_of_python_runs_as_it_stands(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prints = "print(" in block
    exec(compile(block, "README.md", "exec"), names(tmp_path, ill=prints))
    if prints:
        assert "critical non_finite" in capsys.readouterr().out
    if "run_dir=" in block:
        assert (tmp_path / "runs" / "one" / "stabmon" / "readings.jsonl").is_file()


def test_there_is_code_to_run() -> None:
    assert len(blocks("python")) >= 2
    assert len(blocks("sh")) >= 3


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
)
def test_a_shell_command_names_what_there_is(line: str) -> None:
    from stabmon.cli import app

    program, command, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif program == "stabmon":
        known: Any = typer.main.get_command(app)
        options = {
            each for parameter in known.get_command(None, command).params for each in parameter.opts
        }
        assert {each for each in arguments if each.startswith("--")} <= options
    else:
        assert (program, command) == ("pip", "install")
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
            "optional-dependencies"
        ]
        assert set(re.findall(r"\w+", arguments[0])) - {"stabmon"} <= extras.keys()


def test_files_that_are_named_exist() -> None:
    named = set(
        re.findall(
            r"`(?:python |stabmon train )?((?:tests|configs|train)/[\w/]+\.(?:py|yaml))", README
        )
    )
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
