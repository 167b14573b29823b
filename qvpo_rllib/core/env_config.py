"""An environment's arguments as JSON: one encoding without loss, or a refusal by name.

What JSON has no word for is an object with one key: {"$tuple": […]}, {"$path": "…"}, {"$float":
"nan"}, {"$array": [dtype, shape, bytes in hexadecimal]}, {"$scalar": …} likewise.
"""

import math
from pathlib import Path, PurePath
from typing import Any

import numpy as np

ARRAY_KINDS = "biufU"  # booleans, integers, floats, texts: their bytes say all
ALLOWED = (
    "None, booleans, numbers, texts, lists, tuples, paths, dicts whose keys are texts that do not "
    "begin with '$', NumPy numbers, and NumPy arrays of numbers or texts"
)


def encode_env_config(value: Any, name: str = "env_config") -> Any:
    """Returns `value` as JSON has it; `decode_env_config` gives back an equal one of its type.

    Args:
        name: of the value, in messages.

    Raises:
        ValueError: it, or something in it, cannot be encoded without loss.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, dict):  # RLlib's `EnvContext` too
        keys_fit = all(type(key) is str and not key.startswith("$") for key in value)
        if keys_fit:
            return {k: encode_env_config(v, f"{name}[{k!r}]") for k, v in value.items()}
    if kind in (list, tuple):
        items = [encode_env_config(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if isinstance(value, PurePath):
        return {"$path": str(value)}
    is_scalar = isinstance(value, np.generic)
    if (is_scalar or kind is np.ndarray) and value.dtype.kind in ARRAY_KINDS:
        content = [value.dtype.str, list(value.shape), value.tobytes().hex()]
        return {"$scalar" if is_scalar else "$array": content}
    raise ValueError(
        f"{name}={_short(value)} is not allowed: checkpoints and bundles keep the environment's "
        f"arguments, and a {kind.__name__} like this cannot be kept without loss. Allowed are "
        f"{ALLOWED}. Give a name or numbers, of which the environment makes the rest."
    )


def decode_env_config(value: Any) -> Any:
    """Returns what `encode_env_config` was given. Raises `ValueError` if it was changed since."""
    if isinstance(value, list):
        return [decode_env_config(item) for item in value]
    if not isinstance(value, dict):
        return value
    content: Any
    tag, content = next(iter(value.items()), ("", None))
    if not tag.startswith("$"):
        return {key: decode_env_config(item) for key, item in value.items()}
    try:
        match tag:
            case "$float":
                return float(content)
            case "$tuple":
                return tuple(decode_env_config(item) for item in content)
            case "$path":
                return Path(content)
            case "$array" | "$scalar":
                dtype, shape, data = content
                array = np.frombuffer(bytes.fromhex(data), dtype).reshape(shape).copy()
                return array if tag == "$array" else array[()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"env_config has a damaged {tag} ({error}).") from None
    raise ValueError(f"env_config has an unknown {tag!r}: use the version that wrote it.")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
