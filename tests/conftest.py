"""What holds for the whole session of tests."""

collect_ignore = ["support/third_party"]
"""A package of its own, which tests install."""
