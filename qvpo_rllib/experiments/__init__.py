"""What surrounds a training run: its directory, its live status and its plots."""
