"""Another trainer's configuration as a recipe, with every line of it accounted for."""
