"""What a person sees of a run, and what a run writes down about itself: the live display of rank 0,
`metrics.jsonl`, TensorBoard events and pictures of them. Records are plain dictionaries and lists of numbers;
only `run`, which gathers them from the ranks, imports from further down the house."""
