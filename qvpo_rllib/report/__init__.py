"""The report over finished, half-finished and missing runs: the code of `qvpo report`."""
