"""Helpers that several test files share. Whoever uses one computes on the device that MLX_EMPIRE_DEVICE names."""

from mlx_empire.comm.connect import choose_device

choose_device()
