"""What train.py and sample.py share: command line, miniature, a run's folder, sheets of pictures."""
