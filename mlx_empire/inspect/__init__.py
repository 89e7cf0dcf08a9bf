"""What the model will see of a recipe's data, before training; and other tools' rows written as ours."""
