"""How good the model is on data that it does not train on. May import `engine` and everything below it."""
