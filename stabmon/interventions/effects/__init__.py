"""Hold the changes that interventions make."""
