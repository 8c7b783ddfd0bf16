"""Small models, texts and recipes for checks and studies."""
