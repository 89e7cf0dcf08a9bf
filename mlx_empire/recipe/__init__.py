"""What the user asked for: the schema of a recipe, its strict loading from YAML, and nothing that computes.

May import only `mlx_empire.errors`.
"""
