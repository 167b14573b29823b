"""`qvpo train`: from the command's words to a run directory."""
