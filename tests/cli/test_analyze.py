"""``stabmon analyze`` as a user types it."""

import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import T5Config, T5ForConditionalGeneration

from stabmon._storage.strict_json import loads
from stabmon.analysis import attention_maps, attention_rollout
from stabmon.cli import main
from stabmon.cli.analyzing.parsing import parsed_numbers, parsed_size
from tests.support import check_models as models

TEXT = (
    "The quick brown fox jumps over the lazy dog, and then the quick brown fox does it again. " * 6
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, a text, token ids and images."""
    folder = tmp_path_factory.mktemp("saved")
    small = {"hidden_size": 32, "intermediate_size": 32}
    models.llama(**small).save_pretrained(folder / "llama")
    models.gpt2(n_embd=32, n_positions=64).save_pretrained(folder / "gpt2")
    models.bert().save_pretrained(folder / "bert")
    models.vit().save_pretrained(folder / "vit")
    config = T5Config(
        vocab_size=256,
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").write_text("")
    (folder / "ids.json").write_text(json.dumps([[5, 6, 7, 8, 9, 10], [1, 2, 3, 4]]))
    (folder / "far.json").write_text("[[1, 2, 300]]")
    np.save(folder / "ids.npy", np.arange(20).reshape(2, 10))
    torch.save(torch.arange(12)[None], folder / "ids.pt")
    (folder / "images").mkdir()
    for n in range(2):
        pixels = np.random.default_rng(n).integers(0, 255, (48, 40, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{n}.png")
    return folder


@pytest.fixture
def run(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in the folder; gives exit status, standard output and standard error."""
    monkeypatch.chdir(saved)

    def run(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stabmon", "analyze", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw each figure but encode none, for tests that are about numbers and files."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    monkeypatch.setattr(
        "stabmon.cli.analyzing.writing.encoded", lambda figure, form: ("image/png", file.getvalue())
    )


def bytes_of(start: int, stop: int) -> torch.Tensor:
    return torch.tensor([list(TEXT.encode()[start:stop])])


def test_a_rollout_is_written_as_page_figures_and_numbers(
    run: Run, saved: Path, tmp_path: Path
) -> None:
    status, out, err = run(
        "llama", "--text", "text.txt", "--length", 48, "--out", tmp_path / "out", "--json"
    )
    told = json.loads(out)
    assert (status, err) == (0, "")
    assert set(told["files"]) == {each.name for each in (tmp_path / "out").iterdir()}
    assert {"rollout.html", "rollout.json", "rollout.safetensors", "rollout_text_0.png"} <= set(
        told["files"]
    )
    stored = loads((tmp_path / "out" / "rollout.json").read_text())
    assert stored["schema_version"] == 1
    assert stored["tokens"][0][:3] == ["T", "h", "e"]
    matrix = load_file(tmp_path / "out" / "rollout.safetensors")["matrix"]
    model = models.llama(hidden_size=32, intermediate_size=32)
    expected = attention_rollout(model, {"input_ids": bytes_of(0, 48)}).matrix
    assert np.abs(matrix - expected.numpy()).max() < 1e-5
    assert told["numbers"]["first_token_share"][0][-1] == pytest.approx(
        float(expected[0, -1, 0]), abs=1e-5
    )
    with Image.open(tmp_path / "out" / "rollout_text_0.png") as read:
        assert read.size[0] > 500


def test_samples_are_stretches_over_the_whole_text_and_the_last_target_is_told(
    run: Run, quick: None, tmp_path: Path
) -> None:
    status, out, _ = run(
        "gpt2",
        "--text",
        "text.txt",
        "--samples",
        3,
        "--target",
        "-1,5",
        "--out",
        tmp_path,
        "--json",
    )
    told = json.loads(out)
    assert status == 0
    assert told["samples"] == 3
    stored = loads((tmp_path / "rollout.json").read_text())
    assert "".join(stored["tokens"][0]) == TEXT[:64]
    assert "".join(stored["tokens"][2]) == TEXT[-64:]
    assert stored["targets"] == [[63, 5]] * 3
    assert [each["target"] for each in told["numbers"]["samples"]] == [5, 5, 5]


def test_patterns_of_an_encoder_are_told_with_chosen_layers_and_heads(
    run: Run, tmp_path: Path
) -> None:
    status, out, _ = run(
        "bert",
        "--text",
        "text.txt",
        "--kind",
        "patterns",
        "--layers",
        "1",
        "--heads",
        "0,2",
        "--length",
        32,
        "--out",
        tmp_path,
        "--json",
    )
    told = json.loads(out)
    assert status == 0
    assert list(told["numbers"]["layers"]) == ["bert.encoder.layer.1.attention.self"]
    assert told["numbers"]["roles"]
    page = (tmp_path / "patterns.html").read_text()
    assert '"heads": [0, 2]' in page


def test_maps_of_a_config_alone_come_with_a_note_on_random_weights(
    run: Run, saved: Path, tmp_path: Path
) -> None:
    status, out, _ = run(
        saved / "llama" / "config.json",
        "--text",
        "text.txt",
        "--kind",
        "heatmap",
        "--length",
        16,
        "--heads",
        "3",
        "--layers",
        "layers.1",
        "--format",
        "svg",
        "--out",
        tmp_path,
    )
    assert status == 0
    assert "the weights are random" in " ".join(out.split())
    stored = loads((tmp_path / "heatmap.json").read_text())
    assert stored["heads"] == [3]
    assert (tmp_path / "heatmap_heads.svg").read_text().startswith("<?xml")
    arrays = load_file(tmp_path / "heatmap.safetensors")
    assert list(arrays) == ["maps/model.layers.1.self_attn"]
    assert arrays["maps/model.layers.1.self_attn"].shape == (1, 16, 16)


def test_cake_is_run_with_its_flags_and_drawn_again_without_the_model(
    run: Run, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    status, out, err = run(
        "llama",
        "--text",
        "text.txt",
        "--kind",
        "cake",
        "--cache-size",
        "25%",
        "--window",
        8,
        "--tau1",
        1.2,
        "--gamma",
        150,
        "--length",
        80,
        "--max-new-tokens",
        4,
        "--out",
        first,
        "--json",
    )
    told = json.loads(out)
    assert status == 0
    assert err == ""
    assert told["numbers"]["compression_ratio"] == pytest.approx(0.25)
    assert set(told["numbers"]["perplexities"]["cost"]) >= {
        "cake",
        "snapkv",
        "h2o",
        "recency",
        "random",
    }
    stored = loads((first / "cake.json").read_text())
    assert (
        stored["settings"]["tau1"],
        stored["settings"]["gamma"],
        stored["settings"]["tau2"],
    ) == (1.2, 150.0, 1.0)
    assert {"cake_decode.png", "cake_perplexity.png", "cake_kept.png"} <= set(told["files"])
    before = {each.name: each.read_bytes() for each in first.iterdir()}
    status, again, _ = run("--from", first, "--json")
    assert status == 0
    after = {each.name: each.read_bytes() for each in first.iterdir()}
    assert loads(after.pop("cake.json")) == loads(before.pop("cake.json"))
    assert after == before
    assert json.loads(again)["numbers"] == told["numbers"]


def test_a_vision_model_reads_a_folder_of_images(run: Run, quick: None, tmp_path: Path) -> None:
    status, out, _ = run("vit", "--text", "images", "--out", tmp_path, "--json")
    told = json.loads(out)
    assert status == 0
    assert any("resized to 32 × 32" in note for note in told["notes"])
    arrays = load_file(tmp_path / "rollout.safetensors")
    assert arrays["images"].shape == (2, 32, 32, 3)
    with Image.open("images/0.png") as read:
        expected = np.asarray(read.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(arrays["images"][0].astype(int) - expected).max() <= 1
    pixels = torch.from_numpy(expected.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    rolled = attention_rollout(models.vit(), {"pixel_values": pixels}).matrix
    assert np.abs(arrays["matrix"][0] - rolled[0].numpy()).max() < 1e-4
    assert (tmp_path / "rollout_image_1.png").exists()


def test_an_encoder_and_its_decoder_are_joined_on_request(
    run: Run, quick: None, tmp_path: Path
) -> None:
    status, _, _ = run(
        "t5", "--text", "text.txt", "--stack", "joined", "--length", 12, "--out", tmp_path
    )
    assert status == 0
    assert loads((tmp_path / "rollout.json").read_text())["stack"] == "joined"


def test_gradient_weighting_and_head_fusion_are_passed_on(
    run: Run, quick: None, tmp_path: Path
) -> None:
    run("gpt2", "--text", "text.txt", "--length", 12, "--weighting", "gradient", "--out", tmp_path)
    assert loads((tmp_path / "rollout.json").read_text())["weighting"] == "gradient"
    run("gpt2", "--text", "text.txt", "--length", 12, "--head-fusion", "max", "--out", tmp_path)
    assert loads((tmp_path / "rollout.json").read_text())["head_fusion"] == "max"


@pytest.mark.parametrize("name", ["ids.json", "ids.npy", "ids.pt"])
def test_token_ids_are_read_as_rows_or_stretches(
    run: Run, quick: None, tmp_path: Path, name: str
) -> None:
    status, out, _ = run("llama", "--text", name, "--kind", "heatmap", "--out", tmp_path, "--json")
    told = json.loads(out)
    assert status == 0
    assert told["samples"] == {"ids.json": 2, "ids.npy": 2, "ids.pt": 1}[name]
    first = {
        "ids.json": [5, 6, 7, 8, 9, 10],
        "ids.npy": list(range(10)),
        "ids.pt": list(range(12)),
    }[name]
    assert loads((tmp_path / "heatmap.json").read_text())["tokens"][0] == [
        str(each) for each in first
    ]
    maps = attention_maps(
        models.llama(hidden_size=32, intermediate_size=32), {"input_ids": torch.tensor([first])}
    )
    arrays = load_file(tmp_path / "heatmap.safetensors")
    for layer, expected in maps.maps.items():
        assert np.abs(arrays[f"maps/{layer}"] - expected).max() < 1e-5


def test_rows_of_different_length_are_padded_where_the_model_needs_it(
    run: Run, quick: None, tmp_path: Path
) -> None:
    """The second sample's last row equals that of the sample alone."""
    status, _, _ = run("llama", "--text", "ids.json", "--out", tmp_path)
    assert status == 0
    matrix = load_file(tmp_path / "rollout.safetensors")["matrix"]
    alone = attention_rollout(
        models.llama(hidden_size=32, intermediate_size=32),
        {"input_ids": torch.tensor([[1, 2, 3, 4]])},
    )
    assert np.abs(matrix[1, -1, 2:] - alone.matrix[0, -1].numpy()).max() < 1e-5
    assert np.abs(matrix[1, -1, :2]).max() == 0


REFUSED = [
    ("bert --text text.txt --kind cake --length 64", "KV cache exists in causal decoders only"),
    (
        "llama --text text.txt --kind cake --length 64 --window 99",
        "--window 99: leaves nothing to evict of a prompt of 64",
    ),
    ("llama --text text.txt --kind cake --length 64 --cache-size 0", "--cache-size '0'"),
    (
        "llama --text text.txt --kind cake --length 64 --window 8 --pool 4",
        "pool 4: give an odd number",
    ),
    ("llama --text text.txt --kind cake --length 64 --window 8 --tau1 0", "tau1 0.0"),
    (
        "llama --text text.txt --kind cake --length 64 --window 8 --allotment x",
        "give filled or published",
    ),
    (
        "gpt2 --text text.txt --kind cake --length 64 --window 8 --max-new-tokens 9",
        "the model has 64 positions",
    ),
    ("llama --text empty.txt", "empty.txt: is empty"),
    ("llama --text nowhere.txt", "no such file"),
    ("llama --text far.json", "token id 300 is out of range, the model knows 0 to 255"),
    ("llama --ids text.txt", "token ids cannot be read"),
    ("llama --text text.txt --kind maps", "use rollout, patterns, cake, heatmap"),
    ("llama --text text.txt --layers 7 --length 8", "no layer 7, the model has 2"),
    ("llama --text text.txt --layers encoder --length 8", "matches no layer"),
    ("llama --text text.txt --layers ( --length 8", "neither numbers nor a regular expression"),
    (
        "llama --text text.txt --kind heatmap --heads 4 --length 8",
        "no head 4, model.layers.0.self_attn has 4",
    ),
    ("llama --text text.txt --heads 1", "--heads does not apply to --kind rollout"),
    ("llama --text text.txt --target 99 --length 8", "no token 99, samples have 8"),
    ("llama --text text.txt --kind patterns --target 1,2 --length 8", "give one number"),
    ("llama --text text.txt --length 9999", "give at most 534"),
    ("gpt2 --text text.txt --length 65", "the model has 64 positions"),
    ("llama --text text.txt --samples 0", "--samples 0"),
    ("llama --text text.txt --samples 500 --length 64", "too few for so many"),
    ("llama --text text.txt --stack decoder --length 8", "stack 'decoder'"),
    ("llama --text text.txt --weighting x", "use gradient"),
    ("llama --text text.txt --format gif", "--format 'gif'"),
    ("llama --text text.txt --fail-on never", "--fail-on 'never'"),
    ("llama --text text.txt --out text.txt", "is a file"),
    ("llama --text images", "is a folder, and LlamaForCausalLM reads tokens"),
    ("llama", "nothing to analyse"),
    ("vit --text text.txt", "reads images"),
    ("vit --text vit", "holds no images"),
    ("vit --text images --kind cake", "KV cache exists in causal decoders only"),
    ("nowhere/at/all --text text.txt", "no such file or folder"),
    ("--text text.txt", "no MODEL"),
    ("--from images", "holds no record"),
    ("--from nowhere", "no such folder"),
    ("--from images --kind cake", "cake.json: No such file"),
    ("--from images --text text.txt", "--text does not go with --from"),
]


@pytest.mark.parametrize(("words", "reason"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_line_and_writes_nothing(
    run: Run, saved: Path, tmp_path: Path, words: str, reason: str
) -> None:
    before = sorted(saved.rglob("*"))
    out = () if "--out" in words else ("--out", tmp_path / "deep" / "out")
    status, printed, err = run(*words.split(), *out)
    assert (status, printed) == (2, "")
    assert reason in err
    assert err.count("\n") == 1
    assert err.startswith("stabmon: ")
    assert sorted(saved.rglob("*")) == before
    assert not list(tmp_path.iterdir())


def test_a_model_too_large_to_be_made_whole_is_refused(run: Run, tmp_path: Path) -> None:
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
    status, _, err = run(tmp_path / "config.json", "--text", "text.txt", "--out", tmp_path / "out")
    assert status == 2
    assert "the whole model (" in err
    assert not (tmp_path / "out").exists()


def test_corrupt_records_are_refused(run: Run, quick: None, tmp_path: Path) -> None:
    run("gpt2", "--text", "text.txt", "--kind", "heatmap", "--length", 8, "--out", tmp_path)
    numbers, text = tmp_path / "heatmap.safetensors", tmp_path / "heatmap.json"
    whole, words = numbers.read_bytes(), text.read_text()
    numbers.write_bytes(whole[:100])
    status, _, err = run("--from", tmp_path)
    assert (status, "heatmap.safetensors: cannot be read" in err) == (2, True)
    numbers.write_bytes(whole)
    text.write_text(words[:-20])
    status, _, err = run("--from", tmp_path)
    assert (status, "not a valid record" in err) == (2, True)
    values = json.loads(words)
    del values["sizes"]
    text.write_text(json.dumps(values))
    status, _, err = run("--from", tmp_path)
    assert (status, "lacks what its page needs" in err) == (2, True)


def test_nothing_is_half_written_when_a_figure_fails(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "out"

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("stabmon.figures.heatmaps.layer_grid", fail)
        status, _, err = run(
            "gpt2", "--text", "text.txt", "--kind", "heatmap", "--length", 8, "--out", out
        )
        assert (status, "no space left" in err) == (2, True)
        assert not list(tmp_path.iterdir())
    run("gpt2", "--text", "text.txt", "--kind", "heatmap", "--length", 8, "--out", out)
    before = {each.name: each.read_bytes() for each in out.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr("stabmon.figures.heatmaps.layer_grid", fail)
        run("gpt2", "--text", "text.txt", "--kind", "heatmap", "--length", 9, "--out", out)
    assert {each.name: each.read_bytes() for each in out.iterdir()} == before
    assert [each.name for each in out.parent.iterdir()] == ["out"]


def test_a_second_run_takes_away_what_the_first_left_of_its_kind_and_nothing_else(
    run: Run, quick: None, tmp_path: Path
) -> None:
    run("gpt2", "--text", "text.txt", "--length", 8, "--samples", 2, "--out", tmp_path)
    assert (tmp_path / "rollout_text_1.png").exists()
    (tmp_path / "rollout_mine.png").write_text("mine")
    run("gpt2", "--text", "text.txt", "--length", 8, "--out", tmp_path)
    assert not (tmp_path / "rollout_text_1.png").exists()
    assert (tmp_path / "rollout_mine.png").read_text() == "mine"


def test_surfaces_are_written_on_request(run: Run, quick: None, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    args = ("gpt2", "--text", "text.txt", "--kind", "heatmap", "--length", 8, "--surface")
    status, out, _ = run(*args, "--out", tmp_path, "--json")
    files = [name for name in json.loads(out)["files"] if "surface" in name]
    assert (status, files) == (0, ["heatmap_surface_0.html", "heatmap_surface_1.html"])
    page = (tmp_path / files[1]).read_text()
    assert "Attention of layer 1, heads averaged" in page
    assert 'src="http' not in page


def test_long_work_is_told_beforehand_on_standard_error_alone(
    run: Run, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stabmon.cli.analyzing.run.LONG", 0.0)
    args = ("gpt2", "--text", "text.txt", "--kind", "heatmap", "--length", 8, "--out", tmp_path)
    status, out, err = run(*args, "--json")
    assert status == 0
    assert err == "stabmon: heatmap of 1 × 8 bytes of text.txt takes about 0 s\n"
    assert json.loads(out)["kind"] == "heatmap"


def test_a_missing_library_is_named_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "jinja2" else find(name, *rest),
    )
    status, _, err = run("nowhere", "--text", "text.txt", "--out", tmp_path / "out")
    assert (status, err) == (2, 'stabmon: jinja2 is not installed: pip install "stabmon[report]"\n')


def test_findings_give_exit_status_1(run: Run, quick: None, saved: Path, tmp_path: Path) -> None:
    model = models.gpt2(n_embd=32, n_positions=64)
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.bias[3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    status, out, _ = run(
        tmp_path / "nan",
        "--text",
        "text.txt",
        "--kind",
        "heatmap",
        "--length",
        8,
        "--out",
        tmp_path / "a",
        "--json",
    )
    found = json.loads(out)["findings"]
    assert status == 1
    assert [(each["severity"], each["name"]) for each in found] == [("error", "non_finite")]
    args = ("gpt2", "--text", "text.txt", "--length", 4, "--target", "1", "--out", tmp_path / "b")
    assert run(*args)[0] == 0
    assert run(*args, "--fail-on", "warning")[0] in (0, 1)


def test_numbers_and_ranges_are_read() -> None:
    assert parsed_numbers("0, 2-4,-1", "--heads") == [0, 2, 3, 4, -1]
    for wrong in ("", "a", "4-2", "1;2"):
        with pytest.raises(ValueError, match="--heads"):
            parsed_numbers(wrong, "--heads")
    assert [parsed_size(text) for text in ("64", "0.5", "12.5%")] == [64, 0.5, 0.125]
    for wrong in ("x", "1.5", "-3", "200%", "0"):
        with pytest.raises(ValueError, match="--cache-size"):
            parsed_size(wrong)
