"""What train.py and sample.py share: the command line, the bundled miniature, a run's folder, sheets of pictures."""
