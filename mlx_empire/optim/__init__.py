"""The optimizer as pure functions over flat shards: AdamW, Lion, SGD, 8-bit states, masters, schedules, norm.

`AdamW8bit` is the same AdamW for any MLX training loop. Nothing here knows of ranks' messages, models or files.
"""

from mlx_empire.optim.dropin import AdamW8bit

__all__ = ["AdamW8bit"]
