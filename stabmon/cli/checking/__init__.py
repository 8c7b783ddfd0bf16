"""Parts of ``stabmon check``: its options, and the work."""
