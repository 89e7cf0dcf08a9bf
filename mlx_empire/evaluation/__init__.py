"""How good the model is on data that it does not train on."""
