"""mlx_empire: full fine-tuning of large language models over a few Macs of unequal memory, on Apple MLX."""

__version__ = "0.2.0"
