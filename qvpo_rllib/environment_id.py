"""Whether an environment of that name exists."""

import difflib

import gymnasium as gym
from ray.tune.registry import ENV_CREATOR, _global_registry


def check_environment_id(env_id: str) -> None:
    """Raises `ValueError` with the nearest names if neither Gymnasium nor Ray knows `env_id`."""
    if _global_registry.contains(ENV_CREATOR, env_id) or env_id in gym.registry:
        return
    if ":" in env_id or "." in env_id:  # "module:Env-v0", or a class path that RLlib imports
        return
    latest = {(spec.namespace, spec.name): spec.id for spec in gym.registry.values()}
    close = difflib.get_close_matches(env_id, latest.values(), n=3, cutoff=0.5)
    suggestion = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"There is no environment {env_id!r}.{suggestion} Allowed are Gymnasium's ids (such as "
        "'Ant-v5'), 'module:Id-v0', and names registered with ray.tune.register_env."
    )
