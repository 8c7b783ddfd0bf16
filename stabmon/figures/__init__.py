"""Draw arrays: heatmaps, lines, shaded tokens and images, caches, surfaces.

Nothing here knows of models or records: arrays, units and labels are arguments. Figures are drawn
on :class:`matplotlib.figure.Figure` without pyplot, so no backend is chosen and no state is kept.
Colour maps grow in lightness and lines differ in dash and marker, so that every figure can be read
in black and white; a value that is NaN is grey.

Every function takes ``path``: the suffix (``.png``, ``.svg``, ``.pdf``) chooses the format.
"""
