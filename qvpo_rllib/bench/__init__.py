"""What `qvpo bench` measures. Only `serve` needs more than torch and NumPy."""
