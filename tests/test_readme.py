"""The README's code as a reader would type it."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.small_runs import Tokens, gpt2

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Every fenced block of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


FIRST, *OTHERS = blocks("python")
"""The block that a reader runs as it stands, and those that need what the reader has."""
SAID, TABLE = blocks("text")
"""What the first block prints on standard error, and the last block on standard output."""
COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
STABMON = [line for line in COMMANDS if line.startswith("stabmon ")]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 2048,
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the first block in a file and folder of its own; return the folder and what it said."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "first.py").write_text(FIRST)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "README.md").write_text(README)
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "first.py"],
        cwd=folder,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (0, "")
    return folder, done.stderr


def without_numbers(text: str) -> str:
    """Put text on one line, its numbers as one sign: their last digits depend on the machine."""
    return " ".join(re.sub(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", "#", text).split())


def names(folder: Path) -> dict[str, Any]:
    """Return what the blocks take as the reader's: real, small, and with a NaN in the weights."""
    import lightning
    from transformers import TrainingArguments

    model = gpt2(n_positions=256)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan
    options: dict[str, Any] = {
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "save_strategy": "no",
        "max_steps": 3,
    }

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2()

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3)

    return {
        "model": model,
        "args": TrainingArguments(str(folder / "out"), **options),
        "data": Tokens(32),
        "module": Module(),
        "loader": DataLoader(Tokens(12), 4),
    }


def test_the_first_block_runs_in_a_fresh_file_and_says_what_is_shown(
    reader: tuple[Path, str],
) -> None:
    folder, said = reader
    assert without_numbers(said) == without_numbers(SAID), said
    assert (folder / "runs" / "one" / "stabmon" / "readings.jsonl").is_file()


@pytest.mark.parametrize("block", OTHERS, ids=lambda block: block.strip().splitlines()[-1][:40])
def test_a_block_of_python_runs_with_what_it_names(
    block: str,
    reader: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored = "read_records" in block
    monkeypatch.chdir(reader[0] if stored else tmp_path)
    exec(compile(block, "README.md", "exec"), {} if stored else names(tmp_path))
    printed = capsys.readouterr().out
    if stored:
        assert without_numbers(printed) == without_numbers(TABLE), printed
    elif "print(" in block:
        assert "critical non_finite" in printed


@pytest.mark.parametrize("line", STABMON)
def test_a_command_runs_as_it_stands(
    line: str,
    reader: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the reader's folder, after the first block."""
    from stabmon.cli import main

    monkeypatch.chdir(reader[0])
    words = shlex.split(line, comments=True)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        main()
    alarmed = words[1] in ("watch", "report")
    assert left.value.code == int(alarmed), capsys.readouterr().err
    if "--out" in words:
        assert Path(words[words.index("--out") + 1]).stat().st_size > 1000
    else:
        assert capsys.readouterr().out


def test_every_command_is_shown_but_train() -> None:
    from stabmon.cli import COMMANDS as KNOWN

    assert {line.split()[1] for line in STABMON} == KNOWN.keys() - {"train"}


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in STABMON])
def test_other_commands_name_what_there_is(line: str) -> None:
    program, command, *arguments = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    assert (program, command) == ("pip", "install")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"\w+", arguments[0])) - {"stabmon"}
    also = set(line.partition("also ")[2].replace(",", "").split())
    assert extras | also == project["optional-dependencies"].keys() - {"dev", "docs", "bench"}


def test_files_that_are_named_exist() -> None:
    named = set(
        re.findall(
            r"`(?:python |stabmon train )?((?:tests|configs|train)/[\w/]+\.(?:py|yaml))", README
        )
    )
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
