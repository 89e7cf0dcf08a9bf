"""The optimizer as pure functions over flat shards: AdamW, Lion, SGD, 8-bit states, masters, schedules, norm.

`AdamW8bit` is the same AdamW for any MLX training loop. Nothing here knows of ranks' messages, models or files.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_empire.optim.dropin import AdamW8bit

__all__ = ["AdamW8bit"]


def __getattr__(name: str) -> Any:
    """`AdamW8bit`, loaded when it is asked for: our own trainer does not use it."""
    if name == "AdamW8bit":
        from mlx_empire.optim.dropin import AdamW8bit

        return AdamW8bit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
