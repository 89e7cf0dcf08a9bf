"""What the verbs share: what all ranks agree on, the steps that a recipe asks for, the trainer, its weights, where a
run goes on, and its result."""
