"""What a recipe needs on every machine, and what would suit it better: documents, tables and pages."""
