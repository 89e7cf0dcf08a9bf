"""What to do where the folder of `model.path` is not there, as the end of an error's line."""

from mlx_empire.recipe.schema import Recipe

FETCH = "mlx-empire fetch RECIPE"


def how_to_fetch(recipe: Recipe) -> str:
    """The command that brings the model, and what it needs where the recipe says nowhere to fetch it from."""
    source = recipe.model.source
    if source is not None:
        return f"`{FETCH}` brings it from {source}"
    return f"with model.source: owner/name@revision, `{FETCH}` brings it"
