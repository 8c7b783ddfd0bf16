"""Checks of stabmon on one CUDA GPU, one section a file; ``tests/bench/gpu.py`` runs them."""

import sys
from pathlib import Path

_BENCH = Path(__file__).parents[1]
for _folder in (_BENCH.parents[1], _BENCH, _BENCH.parents[1] / "train"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))
