"""Exit codes of `qvpo`; 0 is success."""

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
