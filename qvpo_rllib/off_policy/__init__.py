"""What QVPO and its off-policy rivals share on RLlib: configuration, policy, algorithm.

QVPO's own are in `qvpo_rllib/{config,policy,algorithm}.py`, a rival's in its file of `rivals/`.
"""
