"""Benchmarks that need neither Ray nor Gymnasium: `qvpo bench`."""
