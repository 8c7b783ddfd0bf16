"""Record attention calls: one file a way in which models attend."""
