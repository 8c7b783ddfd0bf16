"""Talk to the other processes of a run, without ever leaving one waiting."""
