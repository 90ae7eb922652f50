"""Several models on the same tokens, each against a reference."""
