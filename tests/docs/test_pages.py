"""The code of the documentation's pages, as a reader would type it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from torch.utils.data import DataLoader

from stabmon.cli import app
from stabmon.config import StabilityConfig
from tests.support.small_runs import VOCABULARY, Tokens, gpt2

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
RUN = {
    "index.md": None,
    "start_trainer.md": None,
    "start_lightning.md": None,
    "start_loop.md": None,
    "before_training.md": None,
    "guard.md": None,
    "distributed.md": None,
    "controllers.md": None,
    "analysis.md": 1,  # the others take encoders, decoders and long texts as given
}
"""Pages whose code runs as it stands with a small model, and how many blocks of it; None for all."""


def blocks(page: str, language: str) -> list[str]:
    """Return every fenced block of a language, without those that include a file."""
    found = re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    return [block for block in found if "--8<--" not in block]


def given(folder: Path) -> dict[str, Any]:
    """Return what the pages take as given: real, and small."""
    import lightning
    from transformers import TrainingArguments

    model = gpt2(n_positions=256)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    def train_step(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            for batch in DataLoader(Tokens(50), 1):
                model(**batch)

    tokens = torch.arange(320).reshape(2, 160) % VOCABULARY
    quiet: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "report_to": []}
    return {
        "model": model,
        "optimizer": optimizer,
        "args": TrainingArguments(str(folder / "out"), save_strategy="no", max_steps=2, **quiet),
        "data": Tokens(16),
        "loader": DataLoader(Tokens(8), 4),
        "train_step": train_step,
        "module": Module(),
        "options": {
            "max_steps": 2,
            "accelerator": "cpu",
            "logger": False,
            "default_root_dir": folder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        },
        "train": train,
        "batch": {"input_ids": tokens},
        "input_ids": tokens,
    }


@pytest.mark.parametrize("page", RUN)
def test_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert blocks(page, "python")
    for block in blocks(page, "python")[: RUN[page]]:
        exec(compile(block, page, "exec"), given(tmp_path))


@pytest.mark.parametrize("page", sorted(PAGES))
def test_imports_of_a_page_work(page: str) -> None:
    text = "\n".join(blocks(page, "python"))
    lines = re.findall(r"^(?:from .* import \(.*?^\)|(?:from|import) .*?$)", text, re.M | re.S)
    exec("\n".join(lines), {})


@pytest.mark.parametrize("page", sorted(PAGES))
def test_commands_of_a_page_exist(page: str) -> None:
    known: Any = typer.main.get_command(app)
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    for line in lines:
        program, command, *arguments = shlex.split(line, comments=True)
        if program != "stabmon":
            known_elsewhere = {("pip", "install"), ("python", "-W"), ("tensorboard", "--logdir")}
            assert (program, command) in known_elsewhere, line
            continue
        options = {
            each for option in known.get_command(None, command).params for each in option.opts
        }
        assert {each for each in arguments if each.startswith("--")} <= options


@pytest.mark.parametrize("page", sorted(PAGES))
def test_settings_of_a_page_are_settings(page: str) -> None:
    for block in blocks(page, "yaml"):
        StabilityConfig(**yaml.safe_load(block))


@pytest.mark.parametrize("page", sorted(PAGES))
def test_files_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`(?:[a-z ]*)((?:tests|configs|train)/[\w/]+\.(?:py|yaml))", PAGES[page])
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_packages_import_from_their_row_and_those_above() -> None:
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    row = {name: n for n, cell in enumerate(cells) for name in re.findall(r"`(\w+)`", cell)}
    package = ROOT / "stabmon"
    parts = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert parts - {"__init__", "__pycache__", "py"} == row.keys()
    upward = [
        f"{path.relative_to(package)} imports {name}"
        for path in package.rglob("*.py")
        if (own := path.relative_to(package).parts[0].removesuffix(".py")) in row
        for name in re.findall(r"^\s*from stabmon\.(\w+)", path.read_text(), flags=re.MULTILINE)
        if row[name] > row[own]
    ]
    assert upward == []
