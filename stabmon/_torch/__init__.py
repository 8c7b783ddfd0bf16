"""Torch as stabmon uses it: tensors, optimizers and process groups.

Imports nothing of stabmon.
"""
