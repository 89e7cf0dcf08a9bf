"""A run by a recipe: what may be typed, and the run's story with its loop."""
