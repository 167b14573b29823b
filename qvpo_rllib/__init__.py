"""QVPO on RLlib: train a diffusion policy by online reinforcement learning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qvpo_rllib.version import __version__ as __version__

if TYPE_CHECKING:
    from qvpo_rllib.algorithms.qvpo import QVPO as QVPO
    from qvpo_rllib.algorithms.qvpo import QVPOConfig as QVPOConfig
    from qvpo_rllib.algorithms.qvpo import QVPOTorchPolicy as QVPOTorchPolicy

__all__ = ["QVPO", "QVPOConfig", "QVPOTorchPolicy"]


def __getattr__(name: str) -> Any:
    """Loads the three on first use: `import qvpo_rllib.core` must not import Ray."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.algorithms.qvpo"), name)
