"""Small real training runs, healthy and failing, to measure alarms and guard on.

``recipes`` says what to train and which fault to inject, ``models`` builds it, ``inject_fault``
makes it fail, ``trainer`` trains it (watched, guarded, or neither), ``outcome`` decides from losses
alone whether and when it failed, ``bench`` runs and caches all of it.
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[3] / "train")
)  # its GPT and its way of finding queries and keys
