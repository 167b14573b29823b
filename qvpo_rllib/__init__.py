"""QVPO on RLlib: train a diffusion policy by online reinforcement learning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvpo_rllib.algorithm import QVPO as QVPO
    from qvpo_rllib.config import QVPOConfig as QVPOConfig
    from qvpo_rllib.policy import QVPOTorchPolicy as QVPOTorchPolicy

__version__ = "0.1.0"
__all__ = ["QVPO", "QVPOConfig", "QVPOTorchPolicy"]

# Loaded on first use: `import qvpo_rllib.core` must not import Ray.
_HOMES = {"QVPO": "algorithm", "QVPOConfig": "config", "QVPOTorchPolicy": "policy"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
