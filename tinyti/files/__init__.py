"""Files: models, learned words and pictures are read here, and whatever is written is written whole."""
