"""Readings and open issues over the steps of a run."""
