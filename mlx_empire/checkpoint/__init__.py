"""A run's own checkpoints: shards, manifests, copies on other nodes, and which of them stay."""
