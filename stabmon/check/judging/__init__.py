"""Turn measurements into findings and advice."""
