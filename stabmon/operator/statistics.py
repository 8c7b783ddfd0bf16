"""Names of the statistics of attention rows."""

from __future__ import annotations

import math
from typing import Literal, get_args

Statistic = Literal[
    "log_partition",
    "log_partition_2",
    "log_partition_3",
    "mean_score",
    "entropy",
    "collision",
    "jacobian_norm",
    "max_score",
    "min_score",
    "max_logit",
    "min_logit",
    "log_odds_of_rest",
    "first_key_mass",
]
"""Statistics of each row, ``[B, H, Q]`` each, under the names of the operator's methods.

``log_partition_2`` and ``_3`` are ``log_partition(power)``.
"""
STATISTICS: frozenset[str] = frozenset(get_args(Statistic))

EMPTY_ROW: dict[str, float] = {
    "log_partition": -math.inf,
    "log_partition_2": -math.inf,
    "log_partition_3": -math.inf,
    "max_score": -math.inf,
    "max_logit": -math.inf,
    "min_score": math.inf,
    "min_logit": math.inf,
    "log_odds_of_rest": -math.inf,
}
"""Value of a statistic for a row that sees no key, where that is not 0."""
