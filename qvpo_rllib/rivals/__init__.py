"""The algorithms QVPO is compared with, one file each."""
