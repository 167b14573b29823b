"""`python -m qvpo_rllib`, the same as `qvpo`."""

import sys

# Python puts the current directory first, where a file named as a package would be run.
sys.path.append(sys.path.pop(0))

from qvpo_rllib.cli import main

raise SystemExit(main())
