"""Use torch: what stabmon needs of tensors, optimizers and process groups. Imports nothing of
stabmon.
"""
