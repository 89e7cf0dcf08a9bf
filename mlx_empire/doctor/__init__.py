"""What is wrong with the machines of an empire, before a run finds out, and the line that mends it."""
