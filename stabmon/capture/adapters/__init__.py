"""Recorders of attention calls, one file for each way in which models attend."""
