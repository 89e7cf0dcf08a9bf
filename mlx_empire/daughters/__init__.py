"""Many adapters of one base: who trains where, several in one pass, and what a stopped one goes on from."""
