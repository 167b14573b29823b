"""`qvpo tune`: experiment files, Ray Tune, and the ledger of their trials."""
