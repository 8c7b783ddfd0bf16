"""Measure time and memory of attention patterns.

Against the forward alone and against eager maps.

    python tests/bench/patterns_cost.py [--lengths 1024 4096 8192]

Each figure is made in a process of its own, on one thread, of the same random Llama (8 layers, 8
heads of 64, 4 key heads; `analysis_peers.py`). Seconds are of processor time; megabytes are the
peak of resident memory above that of the loaded model.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import json
import os
import resource
import subprocess
import sys
import time

KINDS = ("forward", "eager maps", "statistics and roles", "with similarity", "maps", "with advice")
LONGEST = {"eager maps": 2048, "with advice": 1024}
"""Largest length per kind; longer ones take gigabytes, or half an hour."""


def peak() -> float:
    """Return the peak of resident memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(kind: str, length: int) -> dict[str, float]:
    """Do one thing and return seconds and megabytes."""
    import torch

    from stabmon.analysis.patterns.api import attention_patterns
    from stabmon.analysis.patterns.maps import attention_maps
    from tests.bench.analysis_peers import model_and_batch

    torch.set_num_threads(1)
    model, ids = model_and_batch(length, 1, "eager" if kind == "eager maps" else "sdpa")
    batch = {"input_ids": ids}
    with torch.no_grad():
        model(ids[:, :8])
    before, start = peak(), time.process_time()
    if kind in ("forward", "eager maps"):
        with torch.no_grad():
            model(ids, use_cache=False, output_attentions=kind == "eager maps")
    elif kind == "maps":
        attention_maps(model, batch)
    else:
        similarity, advice = kind == "with similarity", kind == "with advice"
        attention_patterns(model, batch, similarity=similarity, advice=advice)
    return {"seconds": time.process_time() - start, "megabytes": peak() - before}


def main() -> None:
    """Print one row a kind and length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    print(f"{'':24}" + "".join(f"{length:>18}" for length in options.lengths))
    for kind in KINDS:
        cells = []
        for length in options.lengths:
            if length > LONGEST.get(kind, length):
                cells.append(f"{'–':>18}")
                continue
            command = [sys.executable, __file__, "--one", kind, str(length)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            run = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
            found = json.loads(run.stdout.splitlines()[-1])
            cells.append(f"{found['seconds']:9.1f} s{found['megabytes']:5.0f} MB")
        print(f"{kind:24}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
