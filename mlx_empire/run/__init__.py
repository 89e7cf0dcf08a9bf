"""What the verbs share: the same model, data and plan on all ranks, a run's folder, its stop and its result."""
