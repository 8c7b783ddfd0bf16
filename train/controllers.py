r"""Compare learned attention controllers on a small corpus.

The same as ``stabmon train``, from a checkout.

python train/controllers.py configs/controllers/info_density.yaml
python train/controllers.py configs/controllers/info_density.yaml run_dir=runs/quick \
    base.steps=50 seeds='[0]' --text FILE
"""

from __future__ import annotations

import argparse
import sys

from stabmon.cli.train import train


def main() -> int:
    """Read the command line and train.

    Returns:
        The exit status: 2 for a wrong call, with one line of explanation.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file, such as those in configs/controllers")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to lay over the file"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="learn this file in place of the default corpus"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    args = parser.parse_intermixed_args()
    try:
        train(args.config, args.overrides, text=args.text, as_json=args.json)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
