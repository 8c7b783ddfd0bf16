"""Checks of stabmon on one CUDA GPU, one section a file; ``tests/bench/gpu.py`` runs them."""
