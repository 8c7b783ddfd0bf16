"""``stabmon check`` as a user types it."""

import json
import re
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from stabmon.cli import main
from tests.support import check_models as models

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 256,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 128,
    **SIZES,
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a model."""
    models.llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command; return exit status, standard output and standard error."""

    def run(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stabmon", "check", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


def save_with(folder: Path, change: Any) -> None:
    model = models.llama()
    with torch.no_grad():
        change(model.model.layers[1].self_attn)
    model.save_pretrained(folder)


def test_a_config_alone_is_checked_analytically(run: Any, config: Path) -> None:
    status, out, err = run(config, "--dtype", "bf16", "--json")
    report = json.loads(out)
    assert (status, err) == (0, "")
    assert (report["verdict"], report["basis"], report["seq_len"]) == ("pass", "analytic", 128)
    assert report["bfloat16_safe"] is True
    assert report["recommendations"] == []


def test_a_folder_is_measured_with_its_weights(run: Any, folder: Path) -> None:
    status, out, _ = run(folder)
    assert status == 0
    assert "pass" in out
    assert "with its weights" in " ".join(out.split())


@pytest.mark.long
def test_a_model_too_large_to_make_is_checked_by_one_layer_of_each_kind(
    run: Any, tmp_path: Path
) -> None:
    large = {
        "model_type": "gemma2",
        "hidden_size": 256,
        "intermediate_size": 8192,
        "num_hidden_layers": 60,
        "head_dim": 32,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(large | {"num_attention_heads": 8, "num_key_value_heads": 4})
    )
    status, out, _ = run(tmp_path / "config.json", "--json")
    report = json.loads(out)
    assert status == 0
    assert {each["layer"] for each in report["heads"]} == {
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    }
    assert any("2 of 60 layers made" in note for note in report["notes"])
    assert report["seq_len"] == 8192


def test_a_damaged_head_ends_with_1_and_is_written_to_markdown(run: Any, tmp_path: Path) -> None:
    save_with(tmp_path / "model", lambda attention: attention.q_proj.weight[:32].mul_(200))
    status, out, _ = run(tmp_path / "model", "--markdown", tmp_path / "report.md")
    assert status == 1
    assert "damaged_head" in out
    assert "model.layers.1.self_attn head 0" in (tmp_path / "report.md").read_text()


def test_the_first_line_says_what_was_found_and_the_second_what_was_looked_at(
    run: Any, folder: Path
) -> None:
    _, out, _ = run(folder, "--dtype", "torch.bfloat16", "--seq-len", 64)
    said = " ".join(out.split())
    assert said.startswith("pass attention of LlamaForCausalLM of ")
    assert "is expected to be stable in training at 64 tokens in bfloat16: no finding." in said
    assert "Looked at: 8 heads in 2 layers (model.layers.*.self_attn), the model's own" in said
    assert "one forward and backward on 1 × 64 random tokens." in said
    assert said.index("Expected: largest score about ") < said.index("number formats")


def test_the_code_of_a_finding_can_be_copied_and_mends_it(run: Any, tmp_path: Path) -> None:
    save_with(tmp_path / "model", lambda attention: attention.q_proj.weight[:8].mul_(200))
    _, out, _ = run(tmp_path / "model", "--markdown", tmp_path / "report.md")
    code = re.findall(r"^model\.get_parameter\(.*\n", out, flags=re.MULTILINE)
    (fenced,) = re.findall(r"```python\n(.*?)```", (tmp_path / "report.md").read_text(), re.DOTALL)
    assert dedent(fenced).splitlines() == [line.strip() for line in code]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    exec("".join(code), {"model": model})
    model.save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model")[0] == 0


@pytest.mark.parametrize("name", ["half", "torch.float16", "FP16", "f16", "float16"])
def test_a_precision_has_the_names_that_torch_gives_it(run: Any, config: Path, name: str) -> None:
    assert json.loads(run(config, "--dtype", name, "--json")[1])["dtype"] == "fp16"


def test_nan_weights_are_a_finding_with_exit_status_1(run: Any, tmp_path: Path) -> None:
    save_with(tmp_path / "model", lambda attention: attention.k_proj.weight[0].fill_(torch.nan))
    status, out, err = run(tmp_path / "model", "--json")
    report = json.loads(out)
    assert (status, err) == (1, "")
    assert "model.layers.1.self_attn.k_proj.weight (128 NaN" in report["findings"][0]["text"]


def test_a_warning_fails_on_request_only(run: Any) -> None:
    assert run("tests.support.check_models:narrow")[0] == 0
    assert run("tests.support.check_models:narrow", "--fail-on", "warning")[0] == 1


def test_a_callable_gives_a_model_and_may_give_its_sample(run: Any) -> None:
    assert (
        json.loads(run("tests.support.check_models:gpt2", "--json", "--seq-len", 32)[1])["seq_len"]
        == 32
    )
    status, out, _ = run("tests.support.check_models:with_sample", "--json")
    assert (status, json.loads(out)["seq_len"]) == (0, 48)


def test_a_text_without_a_tokenizer_is_read_byte_by_byte(
    run: Any, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 40)
    status, out, _ = run(config, "--text", tmp_path / "text.txt", "--json")
    assert status == 0
    assert any("byte by byte" in note for note in json.loads(out)["notes"])


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex"])
def test_every_implementation_can_be_asked_for(run: Any, config: Path, attention: str) -> None:
    status, out, err = run(config, "--attn", attention, "--json", "--dtype", "fp16")
    assert (status, err) == (0, "")
    used = {fit["path"] for fit in json.loads(out)["precision"] if fit["used"]}
    assert used == {"eager" if attention == "eager" else "fused"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["/nowhere/at/all"], "no such file or folder; give"),
        (["{tmp}"], "holds no config.json; give"),
        (["{tmp}/resnet.json"], "no attention was found in ResNet"),
        (["{tmp}/broken.json"], "give a config.json with a model_type"),
        (["{tmp}/short.txt"], "give a config.json with a model_type"),
        (
            ["{config}", "--dtype", "fp8"],
            "--dtype: unknown precision 'fp8'. Known: fp16 (float16, half, f16), bf16 (bfloat16), ",
        ),
        (
            ["{config}", "--attn", "magic"],
            "--attn: unknown implementation 'magic'. Known: sdpa, eager, flex",
        ),
        (["{config}", "--text", "{tmp}/short.txt"], "give a longer text or --seq-len"),
        (["{config}", "--text", "{tmp}/none.txt"], "name a readable file"),
        (["{config}", "--fail-on", "panic"], "use warning or error"),
        (["{config}", "--batch", "0"], "--batch: 0 must be a whole number of at least 1"),
        (["{config}", "--lr", "-1"], "--lr: -1.0 must be a number above 0 and below 100 or null"),
        (
            ["{config}", "--schedule", "fast"],
            "schedule: 'fast' must be one of constant, linear, cosine",
        ),
        (["{config}", "--plot", "{tmp}/none/region.png"], "none; make it or name another"),
        (["{config}", "--plot", "{tmp}/region.doc"], "cannot be drawn as .doc; name a file ending"),
        (["{config}", "--markdown", "{tmp}"], "is a folder; name a file in it"),
        (["no.model.either:x", "--markdown", "/proc/r.md"], "/proc/r.md: cannot be written"),
        (["tests.support.check_models:with_sample", "--sweep"], "--sweep: "),
        (["{config}", "--markdown", "{tmp}/none/report.md"], "none; make it or name another"),
        (["no.such.module:make"], "give package.module:callable that can be imported"),
        (["tests.support.check_models:WIDTH"], "is a int; give a callable that makes the model"),
        (["tests.support.check_models:nothing"], "cannot be imported from here (AttributeError"),
        (
            ["tests.support.check_models:fails"],
            "fails when it is called (RuntimeError: no weights under this name); give a callable",
        ),
        (["tests.support.check_models:leaves"], "fails when it is called (SystemExit: 3)"),
        (["tests.support.check_models:speechless"], "fails when it is called (Speechless)"),
        (["tests.support.check_models:Broken"], "(ZeroDivisionError: not today)"),
        (["{tmp}/torn"], "cannot load the weights of"),
        (["{tmp}/bytes.json"], "not a model's config that can be read"),
        (["tests.support.check_models:tokens"], "it must give an nn.Module"),
        (
            ["tests.support.check_models:gpt2", "--seq-len", "4096"],
            "the model has 256 learned positions; give at most 256",
        ),
    ],
)
def test_a_wrong_call_is_one_line_that_names_the_mend(
    run: Any, config: Path, tmp_path: Path, args: list[str], says: str
) -> None:
    (tmp_path / "resnet.json").write_text(
        json.dumps({"model_type": "resnet", "depths": [1, 1], "hidden_sizes": [8, 8]})
    )
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "bytes.json").write_bytes(b"\x80\x81{}")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"\x08" + b"\0" * 7 + b"not json")
    filled = [arg.format(tmp=tmp_path, config=config) for arg in args]
    if args == ["{tmp}"]:
        config.unlink()
    status, out, err = run(*filled)
    assert status == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1 + ("usage: me" in err)
    assert out == ""


def test_the_region_is_printed_and_drawn(run: Any, config: Path, tmp_path: Path) -> None:
    status, out, err = run(config, "--region", "--plot", tmp_path / "region.png", "--dtype", "bf16")
    assert (status, err) == (0, "")
    assert "stability region in bf16" in out
    assert "[·]" in out
    assert (tmp_path / "region.png").stat().st_size > 10_000


def test_a_rate_is_judged_by_a_sweep_alone(run: Any, config: Path) -> None:
    status, out, _ = run(config, "--lr", "1e-3", "--json")
    assert status == 0
    assert any("add --sweep" in note for note in json.loads(out)["notes"])


def test_a_sweep_says_where_the_recipe_blows_up(run: Any) -> None:
    status, out, err = run(
        "tests.support.check_models:tiny",
        "--sweep",
        "--lr",
        "1.0",
        "--schedule",
        "cosine:4:100",
        "--json",
    )
    report = json.loads(out)
    assert (status, err) == (1, "")
    assert 0 < report["sweep"]["limit"] < 1.0
    (found,) = report["findings"]
    assert (found["name"], found["severity"]) == ("learning_rate_too_high", "error")
    assert "lower the peak rate" in report["recommendations"][0]
