"""Families that mlx-lm cannot build from the folders that transformers saves: a model file of our own for each.

Each file has the interface of mlx-lm's modules (`Model`, `ModelArgs`, `layers`, `sanitize`) and the names of the
tensors that Hugging Face's folders have, so nothing above it knows whose file it is.
"""
