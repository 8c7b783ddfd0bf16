"""Measure perplexity against cache size for every eviction policy.

python tests/bench/kv_cache.py FOLDER [--task text|recall] [--prompts 24] [--context 1536]
    [--continuation 256] [--out kv_cache.png]

On a model trained to use its context. FOLDER holds a model that tests/bench/long_model.py saved;
where it is missing, the model is trained first (90 minutes). Each prompt is a stretch of held-out
text; each policy compresses it once, and the text that follows is scored with what is left: what
really follows, or, to recall, the rest of a passage that stood somewhere in the prompt and whose
beginning ends it. Where a model does not copy, recall says nothing; the loss of the same passage
without its earlier copy is printed beside. The packaged ALBERT is an encoder: it has no KV cache,
and does not apply.

Prints perplexity with the mean cost in nats per byte against the full cache and its spread over
prompts, how often each policy is the best, and CAKE against each other policy prompt by prompt;
draws the curves; prints time and the cache's peak at several lengths.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabmon.analysis.kv_cache import (
    CompressedCache,
    PerplexityTable,
    Policy,
    compressed_generate,
    perplexity_by_cache_size,
    simulate_cake,
)
from stabmon.analysis.kv_cache.cache.decode import full_log_probabilities
from stabmon.analysis.kv_cache.policies.cake import Cake
from stabmon.analysis.kv_cache.policies.recency import Recency
from stabmon.analysis.record import save_record
from tests.bench.long_model import texts, train

SIZES = (64, 96, 128, 192, 256, 384, 512, 768)
POLICIES = ("cake", "snapkv", "pyramid", "ada_snapkv", "h2o", "recency", "random")


CUE = 48
"""Bytes of a passage repeated before the rest of it is asked for."""


def prompts(
    count: int, context: int, continuation: int, task: str = "text"
) -> tuple[Tensor, Tensor]:
    """Return contexts and their continuations from held-out text.

    Without overlap where there is enough text. In the task ``recall`` the context ends with the
    first bytes of a passage that stood somewhere in it before, and what follows is the rest of that
    passage, so that it pays to have kept it.
    """
    held_out, random = texts()[1], np.random.default_rng(0)
    starts = np.linspace(0, len(held_out) - context - continuation, count).astype(int)
    rows = torch.stack([held_out[at : at + context + continuation] for at in starts])
    if task == "recall":
        for row in rows:
            at = int(random.integers(0, context - 2 * CUE - continuation))
            row[context - CUE :] = row[at : at + CUE + continuation].clone()
    return rows[:, :context], rows[:, context:]


def without_copy(model: Any, contexts: Tensor, continuations: Tensor) -> float:
    """Return the mean loss of continuations after another prompt, in nats per byte.

    Another prompt stands before their cue.
    """
    others = torch.cat([contexts.roll(1, 0)[:, :-CUE], contexts[:, -CUE:]], 1)
    scored = [
        full_log_probabilities(model, context[None], None, continuation[None]).mean()
        for context, continuation in zip(others, continuations, strict=True)
    ]
    return -float(torch.stack(scored).mean())


def variants() -> list[tuple[str, Policy]]:
    """Return settings of CAKE, and plain recency, beside the defaults."""
    return [
        ("cake, published", Cake(allotment="published")),
        ("cake, gamma 0", Cake(gamma=0.0)),
        ("cake, tau 3", Cake(tau1=3.0, tau2=3.0)),
        ("recency, no sinks", Recency(sinks=0)),
    ]


def compare(table: PerplexityTable) -> None:
    """Print the best policies, and CAKE against each other one.

    The mean difference with its standard error over prompts.
    """
    names = list(table.policies)
    cake = names.index("cake")
    print("\nbest policy by size (share of prompts on which each is best):")
    for at, size in enumerate(table.sizes):
        wins = np.bincount(table.nats[:, at].argmin(0), minlength=len(names)) / table.nats.shape[-1]
        print(
            f"  {size}: mean best {names[int(table.nats[:, at].mean(-1).argmin())]}; "
            + ", ".join(
                f"{name} {share:.0%}" for name, share in zip(names, wins, strict=True) if share
            )
        )
    print(
        "\nCAKE minus the other, nats a byte (mean ± standard error over prompts; below 0 CAKE is "
        "better):"
    )
    for at, size in enumerate(table.sizes):
        cells = []
        for other, name in enumerate(names):
            if other != cake:
                difference = table.nats[cake, at] - table.nats[other, at]
                cells.append(
                    f"{name} {difference.mean():+.4f} ± "
                    f"{difference.std(ddof=1) / len(difference) ** 0.5:.4f}"
                )
        print(f"  {size}: " + ", ".join(cells))


def draw(table: PerplexityTable, path: Path) -> None:
    """Draw perplexity against cache size.

    A band is the standard error over prompts of the cost against the full cache.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    full = table.full.mean()
    for row, name in enumerate(table.policies):
        mean = table.cost[row].mean(-1)
        error = table.cost[row].std(-1, ddof=1) / table.cost.shape[-1] ** 0.5
        line = axes.plot(table.sizes, np.exp(full + mean), marker="osD^v<>"[row % 7], label=name)[0]
        axes.fill_between(
            table.sizes,
            np.exp(full + mean - error),
            np.exp(full + mean + error),
            color=line.get_color(),
            alpha=0.1,
        )
    axes.axhline(float(np.exp(full)), color="black", linestyle=":", label="full cache")
    axes.set_xscale("log", base=2)
    axes.set_xticks(table.sizes, [str(size) for size in table.sizes])
    axes.set_xlabel(f"keys kept of {table.context}, per layer and key head")
    axes.set_ylabel(f"perplexity of the next {table.continuation} bytes")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def cost(model: Any, lengths: tuple[int, ...] = (1024, 4096, 8192)) -> None:
    """Print the time of prefill, simulation and compression, and the cache's peak."""
    columns = ("length", "forward s", "simulate_cake s", "compressed prefill s")
    held = ("cache's peak with the cascade, MB", "without (the full cache)", "after the prompt")
    print("\n" + " | ".join((*columns, *held)))
    text = texts()[1]
    for length in lengths:
        ids = text[None, :length]
        began = time.perf_counter()
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)
        forward = time.perf_counter() - began
        began = time.perf_counter()
        simulate_cake(model, ids, cache_size=256)
        simulated = time.perf_counter() - began
        peaks, seconds, after = [], 0.0, 0
        for cascade in (True, False):
            cache = CompressedCache(model, cache_size=256, cascade=cascade)
            began = time.perf_counter()
            with cache.attached(), torch.no_grad():
                model(ids, past_key_values=cache.key_values, logits_to_keep=1)
            seconds = time.perf_counter() - began
            peaks.append(max(stage.bytes_before for stage in cache.stages) / 1e6)
            after = cache.held_bytes()
        times = f"{forward:.2f} | {simulated:.2f} | {seconds:.2f}"
        print(f"{length} | {times} | {peaks[0]:.2f} | {peaks[1]:.2f} | {after / 1e6:.2f}")


def peer(
    python: str,
    folder: Path,
    contexts: Tensor,
    continuations: Tensor,
    table: PerplexityTable,
    args: Any,
) -> None:
    """Print kvpress' losses beside stabmon's, on the same prompts and sizes."""
    with tempfile.TemporaryDirectory() as place:
        data, out = Path(place) / "data.npz", Path(place) / "out.json"
        plain = {"sizes": np.array(table.sizes), "window": args.window, "batch": args.batch}
        np.savez(data, contexts=contexts.numpy(), continuations=continuations.numpy(), **plain)
        script = Path(__file__).with_name("kv_cache_kvpress.py")
        environment = {
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }
        subprocess.run(
            [python, str(script), str(folder), str(data), str(out)], check=True, env=environment
        )
        theirs = json.loads(out.read_text())
    print(
        "\nnats a byte, kvpress / ours (largest difference on one prompt). Its h2o and random "
        "keep no window, and its h2o divides"
        "\nby the queries that see a key; its pyramid falls back on equal budgets where the first "
        "would exceed the prompt:"
    )
    for name, rows in theirs.items():
        ours = table.nats[table.policies.index(name)]
        cells = [
            f"{size}: {np.mean(row):.4f} / {mine.mean():.4f} "
            f"({np.abs(np.array(row) - mine).max():.4f})"
            for size, row, mine in zip(table.sizes, rows, ours, strict=True)
        ]
        print(f"  {name}: " + ", ".join(cells))


def speed(model: Any, length: int = 1536, new: int = 48) -> None:
    """Print the time of a decoded token, with stock and with compressed caches.

    The compressed ones evict at every step.
    """
    ids = texts()[1][None, :length]
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    print(f"\nms a token, {new} tokens after {length}:")

    def timed(run: Callable[[int], object]) -> float:
        seconds = []
        for count in (1, new):
            began = time.perf_counter()
            run(count)
            seconds.append(time.perf_counter() - began)
        return 1000 * (seconds[1] - seconds[0]) / (new - 1)

    def stock(count: int) -> object:
        return model.generate(
            ids, **(settings | {"max_new_tokens": count, "min_new_tokens": count})
        )

    print(f"  stock, full cache {timed(stock):.1f}")
    for policy in ("cake", "h2o", "snapkv"):
        given = {"policy": policy, "cache_size": 256}

        def compressed(count: int, given: dict[str, Any] = given) -> object:
            return compressed_generate(
                model,
                ids,
                **given,
                **(settings | {"max_new_tokens": count, "min_new_tokens": count}),
            )

        print(f"  {policy}, 256 keys {timed(compressed):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--task", choices=("text", "recall"), default="text", help="what follows a prompt"
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--context", type=int, default=1536)
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--variants", action="store_true", help="also settings of CAKE")
    parser.add_argument("--no-cost", action="store_true", help="leave out time and memory")
    parser.add_argument("--out", type=Path, default=Path("kv_cache.png"))
    parser.add_argument(
        "--peer", help="Python of an environment with kvpress, see kv_cache_kvpress.py"
    )
    parser.add_argument("--record", type=Path, help="folder for the record of kind cake")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if (args.folder / "config.json").exists():
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(args.folder)
    else:
        model = train(args.folder, minutes=90)
    model.eval()
    contexts, continuations = prompts(args.prompts, args.context, args.continuation, args.task)
    chosen: list[str | Policy] = [*POLICIES, *(policy for _, policy in variants() if args.variants)]
    began = time.perf_counter()
    table = perplexity_by_cache_size(
        model,
        contexts,
        continuations,
        sizes=args.sizes,
        policies=chosen,
        window_size=args.window,
        batch_size=args.batch,
        progress=lambda line: print(f"{line}, {time.perf_counter() - began:.0f} s", flush=True),
    )
    names = [*POLICIES, *(name for name, _ in variants() if args.variants)]
    table = PerplexityTable(
        tuple(names),
        table.sizes,
        table.nats,
        table.full,
        table.context,
        table.continuation,
        table.kept,
    )
    scored = (
        f"{args.prompts} prompts of {args.context} held-out bytes, the next "
        f"{args.continuation} scored"
    )
    print(f"\ntask {args.task}: {scored}; window {args.window}\n")
    print(table.to_markdown())
    if args.task == "recall":
        print(
            f"without the earlier copy {np.exp(without_copy(model, contexts, continuations)):.3f}"
        )
    compare(table)
    draw(table, args.out)
    print(f"\n{args.out}")
    if args.record:
        report = simulate_cake(
            model,
            contexts[:1],
            cache_size=256,
            window_size=args.window,
            continuation=continuations[:1, :32],
        )
        print(*save_record(report.to_record(table), args.record))
    if args.peer:
        peer(args.peer, args.folder, contexts, continuations, table, args)
    if not args.no_cost:
        cost(model)
        speed(model)


if __name__ == "__main__":
    main()
