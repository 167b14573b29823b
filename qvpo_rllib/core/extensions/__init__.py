"""What goes beyond the paper; each is an option of QVPO that is off by default."""
