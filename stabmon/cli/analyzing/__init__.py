"""The parts of ``stabmon analyze``: what goes into the model, what is run, what is written."""
