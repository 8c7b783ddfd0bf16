"""Deliver records to sinks: queued, off the training thread, tried again, gaps marked."""
