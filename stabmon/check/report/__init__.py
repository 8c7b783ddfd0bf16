"""The report of a check."""

from stabmon._moved import moved_names

__getattr__ = moved_names(__name__, "check.report.report", "check.report.results")
