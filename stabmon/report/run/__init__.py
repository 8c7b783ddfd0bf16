"""Page of training runs, from their stored records alone.

The verdict and the next step come first, as static HTML; charts are inline SVG and can be read with
JavaScript off. A script adds the maps with their step slider, single heads and downloads.
"""
