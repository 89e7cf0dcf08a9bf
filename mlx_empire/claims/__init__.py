"""What the owner's documents claim, beside what is computed here."""
