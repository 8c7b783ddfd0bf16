"""Measure other tools on the same work: time, peak memory, size of a page.

python tests/bench/analysis_peers.py [--venv FOLDER] [--lengths 256 2048] [--only NAME ...]

Each figure is made in a process of its own, on one thread, of the same random Llama (8 layers, 8
heads of 64, 4 key heads). Seconds are those of the work alone, megabytes the peak of resident
memory above that of the loaded model. bertviz and TransformerLens are installed into a virtual
environment in FOLDER (made if it is missing), with the torch that this one has. With ``--lengths
1024 4096 8192 --only "forward, sdpa" "stabmon rollout, one target" ...`` it shows how each kind of
analysis grows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BATCHES = {256: 8, 2048: 1}
THEIRS = (
    "bertviz head_view",
    "bertviz model_view",
    "TransformerLens patterns",
    "TransformerLens cache",
)


def model_and_batch(length: int, batch: int, attention: str) -> tuple[Any, torch.Tensor]:
    """Return the random Llama and token ids ``[batch, length]``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    heads = {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 256,
        "max_position_embeddings": 16384,
    }
    config = LlamaConfig(**shape, **heads, bos_token_id=None, eos_token_id=None)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    return model, torch.randint(0, 256, (batch, length))


def bridge(model: Any) -> Any:
    """Return the model in TransformerLens; it wants a tokenizer beside the weights."""
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(256)}, unk_token="0"))
    special = {"unk_token": "0", "eos_token": "1", "bos_token": "2", "pad_token": "3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, hf_model=model)


def prepare(name: str, length: int) -> Callable[[], int | None]:
    """Load everything and return the work to measure.

    What the work returns is a size in bytes.
    """
    batch = 1 if "view" in name or "heatmap" in name else BATCHES.get(length, 1)
    eager = name.startswith(("bertviz", "TransformerLens", "output_attentions", "forward, eager"))
    model, ids = model_and_batch(length, batch, "eager" if eager else "sdpa")
    if name.startswith("forward"):
        return lambda: model(input_ids=ids, use_cache=False) and None
    if name == "output_attentions + rollout":
        return lambda: rollout_of_maps(
            model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        )
    if name.startswith("bertviz"):
        import bertviz

        view, tokens = getattr(bertviz, name.split()[1]), [str(i) for i in range(length)]

        def page() -> int:
            maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
            return len(view(maps, tokens, html_action="return").data.encode())

        return page
    if name.startswith("TransformerLens"):
        wrapped, everything = bridge(model), name.endswith("cache")
        chosen = {} if everything else {"names_filter": lambda hook: hook.endswith("hook_pattern")}
        return lambda: len(wrapped.run_with_cache(ids, **chosen)[1]) and None
    return ours(name, model, ids)


def ours(name: str, model: Any, ids: torch.Tensor) -> Callable[[], int | None]:
    """Return stabmon's work of this name."""
    from stabmon.analysis import (
        attention_maps,
        attention_patterns,
        attention_rollout,
        simulate_cake,
    )

    batch = {"input_ids": ids}
    if name == "stabmon rollout":
        return lambda: attention_rollout(model, batch) and None
    if name == "stabmon rollout, one target":
        return lambda: attention_rollout(model, batch, targets=-1) and None
    if name == "stabmon patterns":
        return lambda: attention_patterns(model, batch, advice=False) and None
    if name == "stabmon cake":
        return lambda: simulate_cake(model, batch, cache_size=ids.shape[1] // 4) and None
    from stabmon.cli.analyzing.writing import write_analysis
    from stabmon.report.kinds import page_of

    def page() -> int:
        record, folder = attention_maps(model, batch).to_record(), tempfile.mkdtemp()
        return (
            (Path(folder) / write_analysis(record, page_of(record), folder, "png")[0])
            .stat()
            .st_size
        )

    return page


OURS = (
    "stabmon rollout",
    "stabmon rollout, one target",
    "stabmon patterns",
    "stabmon cake",
    "stabmon heatmap page",
)
PLAIN = ("forward, sdpa", "forward, eager", "output_attentions + rollout")


def rollout_of_maps(maps: Any) -> None:
    """Roll out kept maps, as tools do."""
    rolled = None
    for each in maps:
        mixed = 0.5 * each.mean(1) + 0.5 * torch.eye(each.shape[-1])
        rolled = mixed if rolled is None else mixed @ rolled


def peak() -> float:
    """Return the peak of resident memory in MB since :func:`reset_peak` (Linux)."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1e3


def reset_peak() -> None:
    """Reset the peak of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


@torch.no_grad()
def measure(name: str, length: int) -> dict[str, float | None]:
    """Measure one work in this process."""
    torch.set_num_threads(1)
    work = prepare(name, length)
    reset_peak()
    before, began = peak(), time.perf_counter()
    size = work()
    return {
        "seconds": time.perf_counter() - began,
        "mb": peak() - before,
        "page_mb": None if size is None else size / 1e6,
    }


def environment(folder: Path) -> Path:
    """Return the Python of the peers' environment, made if it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"installing bertviz and TransformerLens into {folder} ...", file=sys.stderr)
        venv.create(folder, with_pip=True)
        torch_version = torch.__version__.split("+")[0]
        packages = [f"torch=={torch_version}", "bertviz", "transformer_lens", "ipython"]
        subprocess.run([python, "-m", "pip", "install", "-qq", *packages], check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "stabmon-peers")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--only", nargs="+", default=[*PLAIN, *THEIRS, *OURS])
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]))))
        return
    print(f"{'':32} {'S':>6} {'seconds':>8} {'MB':>7} {'page MB':>8}")
    for length in args.lengths:
        for name in args.only:
            python = environment(args.venv) if name in THEIRS else Path(sys.executable)
            command = [python, __file__, "--measure", name, str(length)]
            offline = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, capture_output=True, text=True, env=offline, timeout=1800
            )
            if done.returncode:
                reason = (
                    done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
                )[-1]
                print(f"{name:32} {length:6} failed: {reason[:100]}", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            page = "–" if found["page_mb"] is None else f"{found['page_mb']:.2f}"
            print(
                f"{name:32} {length:6} {found['seconds']:8.2f} {found['mb']:7.0f} {page:>8}",
                flush=True,
            )


if __name__ == "__main__":
    main()
