"""The command ``stabmon check``."""

from __future__ import annotations

from stabmon.cli.checking.options import CheckOptions
from stabmon.cli.options import check_fail_on, command


@command(CheckOptions)
def check(options: CheckOptions) -> bool:
    """Judge before training whether attention will be stable, and name what to change."""
    check_fail_on(options.fail_on)
    from stabmon.cli.checking.run import checked, print_report

    report = checked(options)
    print_report(report, options)
    return report.finds(options.fail_on)
