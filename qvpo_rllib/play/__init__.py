"""`qvpo evaluate`, `record`, `export`, `replay`: what a trained policy is used for."""
