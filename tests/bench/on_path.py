"""Put the root and train/ on the path of a bench that is run as a script: import it first.

if not __package__:
    import on_path
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(each) for each in (_ROOT, _ROOT / "train") if str(each) not in sys.path]
