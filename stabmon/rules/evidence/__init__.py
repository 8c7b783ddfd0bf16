"""Evidence that rules judge: baselines, trends, sustained growth."""
