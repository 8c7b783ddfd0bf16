"""Feed readings of a very large model to the rules, and measure memory, time and state.

python tests/bench/history_scale.py                               1000 layers of 128 heads
python tests/bench/history_scale.py --other-rank                  what other ranks than 0 keep
python tests/bench/history_scale.py --layers 200 --heads 64 --samples 500

Readings have every default signal, the motion of W_q and W_k and the gradient of each layer, drawn
around values of a healthy run, with a few heads in a hundred that grow. Memory is that of the
process above what it was before the first reading; the time of a sample is the processor's in
``IssueTracker.update``, and ends growing once the history is full. 20,000 samples take hours: after
the history is full (36 readings of 1000 layers of 128 heads) nothing is added any more, which the
growth over the second half of the samples shows.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import json
import resource
import sys
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from stabmon.config import load_config
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.engine.monitor_parts import make_tracker
from stabmon.records import LayerInfo, QKUpdate, Reading
from stabmon.rules.tracking.issue_tracker import IssueTracker

MEBIBYTE = 2**20


def reading_of(step: int, layers: int, heads: int, info: dict[str, LayerInfo]) -> Reading:
    """Return a reading of a healthy run in which two heads in a hundred grow."""
    rng = np.random.default_rng(step)
    growth = np.where(np.arange(layers * heads) % 50 == 0, 1 + step / 50, 1.0)
    near = {
        "attention_entropy": 3.0,
        "normalized_entropy": 0.6,
        "max_logit": 5.0,
        "max_probability": 0.3,
        "collision_probability": 0.1,
        "sink_mass": 0.2,
        "softmax_jacobian_norm": 0.2,
        "hnf_log_curvature": 1.0,
        "hnf_log_curvature_bound": 3.0,
        "precision_bits": 8.0,
        "saturated_fraction": 0.01,
    }
    drawn = {name: value * rng.lognormal(0, 0.05, layers * heads) for name, value in near.items()}
    drawn["max_logit"] *= growth
    drawn["normalized_entropy"] = np.minimum(drawn["normalized_entropy"], 1) / growth**0.2
    names = list(info)
    values = {
        layer: {name: each[at * heads : (at + 1) * heads] for name, each in drawn.items()}
        for at, layer in enumerate(names)
    }
    moved = QKUpdate(gradient=0.03, weight=10.0, update=0.1)
    return Reading(
        step,
        2.0 + 1 / step,
        values,
        info=info,
        learning_rate=1e-3,
        gradients={"": 1.0, **dict.fromkeys(names, 0.03)},
        query_key=dict.fromkeys(names, moved),
        learning_rates={"0.0": 1e-3},
        updates={"0.0": 0.01},
    )


def main() -> int:
    """Feed readings, and print the table."""
    args = _arguments()
    config = load_config("observe", log_every=1)
    tracker: IssueTracker = make_tracker(config, ErrorBoundary(), is_shown=not args.other_rank)
    facts = LayerInfo(args.heads, 64, 0.125, "bfloat16")
    info = {f"model.layers.{at}.self_attn": facts for at in range(args.layers)}
    reading_of(1, args.layers, args.heads, info)  # the memory that drawing takes is no history's
    before, seconds, sizes, issues = _resident(), [], [], 0
    for step in range(1, args.samples + 1):
        reading = reading_of(step, args.layers, args.heads, info)
        began = time.process_time()
        issues += len(tracker.update(reading))
        seconds.append(time.process_time() - began)
        del reading
        sizes.append(_resident() - before)
    began = time.process_time()
    state = json.dumps(tracker.state_dict())
    stored = time.process_time() - began
    half = len(sizes) // 2
    table = Table(title=f"{args.layers} layers of {args.heads} heads", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in {
        "samples": f"{args.samples}, of which {len(tracker.history)} are kept",
        "issues emitted": f"{issues}",
        "memory above the start, at the end": f"{sizes[-1] / MEBIBYTE:.0f} MiB",
        "the most of any sample, with its own reading": f"{max(sizes) / MEBIBYTE:.0f} MiB",
        "growth over the second half": f"{(sizes[-1] - sizes[half]) / MEBIBYTE:.0f} MiB",
        "CPU a sample, median": f"{np.median(seconds):.3f} s",
        "CPU a sample, of the last ten": f"{np.median(seconds[-10:]):.3f} s",
        "state as JSON": f"{len(state) / MEBIBYTE:.1f} MiB, in {stored:.2f} s",
        "peak of the process": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB",
    }.items():
        table.add_row(name, value)
    Console().print(table)
    return 0


def _resident() -> int:
    """Return the resident memory of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--heads", type=int, default=128)
    parser.add_argument("--samples", type=int, default=150)
    parser.add_argument("--other-rank", action="store_true", help="as a rank other than 0 keeps it")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
