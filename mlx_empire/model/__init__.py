"""The model to be trained: mlx-lm's module, built lazily and tuned, and what is known of it without its weights.
May import `adapters`, `plan`, `cluster` and `recipe`.
"""
