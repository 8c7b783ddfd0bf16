"""The parts of ``stabmon watch``: find a run, follow it, and lay out its screen."""
