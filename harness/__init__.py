"""What is around the learning: the settings of a run."""
