"""Engine: what each training step measures, judges and changes."""
