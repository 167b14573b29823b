"""Python loads this in every process that a test starts.

Importing Ray, RLlib and PyTorch takes a slow core six seconds, one of them for garbage collection.
"""

import gc

gc.set_threshold(100_000, 50, 50)
