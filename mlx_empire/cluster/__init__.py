"""Which machines there are and what each can hold: hostfile, measurement, and which rank runs where.

May import only `mlx_empire.recipe` and `mlx_empire.errors` (and, to ask the GPU for its limit, `mlx.core`).
"""
