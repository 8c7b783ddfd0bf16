"""Functions that are called by hooks and listeners, and hold on to nothing."""
