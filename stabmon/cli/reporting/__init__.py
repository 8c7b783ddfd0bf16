"""Parts of ``stabmon report``: its options, the runs that it is asked for, what it prints."""
