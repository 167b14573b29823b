"""`qvpo bandit`, `qvpo theorem2`: the paper's figures and theorem that need no environment."""
