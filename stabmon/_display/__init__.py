"""Short views of objects: bars in text, and HTML for notebooks."""
