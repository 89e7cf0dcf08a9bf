"""From the user's files to token rows: formats, prompt masks, splitting and packing, the tokenised cache, and
which example goes where (a pure function of seed and step). Nothing here knows MLX arrays or ranks. Start reading at
`splits.load_splits`."""
