"""Environments -> transitions: workers, episodes, and the pool that a learner collects from."""
