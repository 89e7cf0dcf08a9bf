"""Results as what other tools open: merged models, adapters in PEFT's and mlx-lm's format, packed bases."""
