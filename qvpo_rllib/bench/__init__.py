"""Benchmarks: each module measures one part and has `add(subcommands)` for `qvpo bench`."""
