"""A run on disk: what is in a checkpoint, and how it is written and read back."""
