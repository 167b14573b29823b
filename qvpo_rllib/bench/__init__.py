"""What `qvpo bench` measures: a module for each part, as `options.py` describes it."""
