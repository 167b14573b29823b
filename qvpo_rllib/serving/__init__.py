"""Trained policies outside training: bundles that hold no code, and serving them over HTTP.

Acting with a bundle needs torch, numpy and safetensors, never Ray or Gymnasium; only `app` is for
Ray Serve.

    from qvpo_rllib.serving import load
    actions = load("exported").act(observations)  # [B, O] -> [B, A] in the environment's box
"""

from qvpo_rllib.serving.bundle import load, write_bundle
from qvpo_rllib.serving.description import Description
from qvpo_rllib.serving.policy import ServedPolicy

__all__ = ["Description", "ServedPolicy", "load", "write_bundle"]
