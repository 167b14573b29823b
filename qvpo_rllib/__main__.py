"""`python -m qvpo_rllib`, the same as `qvpo`."""

from qvpo_rllib.cli import main

raise SystemExit(main())
