"""One training step: the layer-major streamed forward and backward over an untouched mlx-lm model.

The model's own `__call__` runs with its layers replaced by slots; weights come and go one unit at a time.
"""
