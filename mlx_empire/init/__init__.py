"""A first recipe: which ones come with the package, what fits here, and one of them for a person's model and data."""
