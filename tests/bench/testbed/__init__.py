"""Small real training runs, healthy and failing, to measure foresight and cures on.

``recipes`` says what to train and what goes wrong with it, ``models`` builds it, ``provoke`` makes
it go wrong, ``trainer`` trains it (watched, guarded, or neither), ``outcome`` says from losses
alone whether and when it failed, ``bench`` runs and caches all of it.
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parents[3] / "train")
)  # its GPT and its way of finding queries and keys
