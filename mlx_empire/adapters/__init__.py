"""Adapters on a frozen base: mlx-lm's own LoRA and DoRA layers put into the lazily built model, quantised bases, and
the values they start from. May import `data`, `comm`, `plan`, `cluster` and `recipe`.
"""
