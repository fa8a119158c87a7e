"""Files: read models, learned words and pictures; write files atomically."""
