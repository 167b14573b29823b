"""A bundle: a directory with a policy's parameters and its description, and no code.

    policy.json          the description, the SHA-256 of every other file, and a digest of itself
    policy.safetensors   actor, critics and the moments that normalise observations, float32
    policy.onnx          optional, for other programs: nothing here reads it

The digests find accidents and careless edits. They are no signature: whoever can write the bundle
can write them too. What no bundle can do is run code: it is parsed, never unpickled.
"""

import hashlib
import itertools
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from qvpo_rllib.serving import description as description_json
from qvpo_rllib.serving.description import Description
from qvpo_rllib.serving.policy import PolicyNetworks, ServedPolicy

DESCRIPTION_FILE = "policy.json"
PARAMETERS_FILE = "policy.safetensors"
ONNX_FILE = "policy.onnx"
# Beyond the parameters themselves: safetensors' header, a few hundred bytes per tensor.
MAX_HEADER_BYTES = 2**20
MAX_PARAMETER_BYTES = 2**30


def encode_parameters(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns what acting needs as the bytes of `policy.safetensors`; the rest is left out."""
    kept = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tensors.items()
        if name.startswith(("actor.", "critic.", "observations."))
    }
    return safetensors.torch.save(kept)


def digest(content: bytes) -> str:
    """Returns the SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def write_bundle(
    directory: Path | str,
    description: Description,
    parameters: bytes,
    onnx: bytes | None = None,
) -> Path:
    """Writes a bundle whole or not at all, and returns its directory.

    Args:
        directory: must not exist yet; nothing is ever overwritten.
        parameters: of `encode_parameters`.

    Raises:
        ValueError: the directory exists or cannot be made, or the parameters do not fit the
            description.
    """
    directory = Path(directory).expanduser().absolute()
    check_absent(directory)
    build_networks(description, parameters)
    files = {PARAMETERS_FILE: parameters}
    if onnx is not None:
        files[ONNX_FILE] = onnx
    digests = {name: digest(content) for name, content in files.items()}
    files[DESCRIPTION_FILE] = description_json.encode(description, digests)
    from qvpo_rllib.files import new_directory  # a server, which writes none, does without

    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        with new_directory(directory, temporary):  # fails if somebody has filled it meanwhile
            for name, content in files.items():
                (temporary / name).write_bytes(content)
    except OSError as error:
        raise ValueError(
            f"The bundle {str(directory)!r} cannot be written: {error}. Give another directory."
        ) from error
    return directory


def check_absent(directory: Path) -> None:
    """Raises `ValueError` if there is something at `directory` already."""
    if os.path.lexists(directory):
        raise ValueError(
            f"{str(directory)!r} exists already, and an export overwrites nothing: give a "
            "directory that does not exist, or move that one away."
        )


def load(directory: Path | str) -> ServedPolicy:
    """Returns the policy of a bundle, ready to act.

    Raises:
        ValueError: there is no bundle, or it is damaged, foreign, or of another format version.
    """
    directory = Path(directory).expanduser().absolute()
    if not directory.is_dir():
        raise ValueError(f"There is no bundle {str(directory)!r}: no such directory.")
    if not (directory / DESCRIPTION_FILE).is_file():
        raise ValueError(
            f"{str(directory)!r} is not a bundle: it has no {DESCRIPTION_FILE}. Make one with "
            "qvpo export CHECKPOINT OUT."
        )
    with _refusing(directory / DESCRIPTION_FILE) as file:
        description, digests = description_json.decode(_read(file, description_json.MAX_BYTES))
    with _refusing(directory / PARAMETERS_FILE) as file:
        networks = _untrained(description)
        num_bytes = sum(p.numel() * 4 for p in networks.state_dict().values())
        parameters = _read(file, num_bytes + MAX_HEADER_BYTES)
        if digest(parameters) != digests.get(PARAMETERS_FILE):
            raise ValueError(
                "its SHA-256 is not the one in policy.json: it was changed or cut short"
            )
        _fill(networks, parameters)
    return ServedPolicy(description, networks)


@contextmanager
def _refusing(file: Path) -> Iterator[Path]:
    """Makes a `ValueError` of what is wrong with `file` one that names it and what to do."""
    try:
        yield file
    except ValueError as error:
        raise ValueError(
            f"{str(file)!r} is refused: {str(error).removesuffix('.')}. Export the policy again "
            "with qvpo export, or use another copy of the bundle."
        ) from error


def _read(file: Path, max_bytes: int) -> bytes:
    """Returns the file's bytes, read once, so that what is checked is what is used."""
    try:
        # Opening a FIFO would wait for whoever writes to it.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            size = status.st_size
            if size > max_bytes:
                raise ValueError(
                    f"it has {size:,} bytes, longer than the {max_bytes:,} that it may have"
                )
            return stream.read(size)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error})") from error


def build_networks(description: Description, parameters: bytes) -> PolicyNetworks:
    """Returns the networks with these parameters. Raises `ValueError` if they do not fit."""
    networks = _untrained(description)
    _fill(networks, parameters)
    return networks


def _untrained(description: Description) -> PolicyNetworks:
    """Returns new networks. Raises `ValueError` if they are larger than any policy's."""
    d = description
    widths = [d.obs_dim + d.act_dim, *d.hidden, max(d.act_dim, d.num_quantiles)]
    num_bytes = 4 * 3 * sum(a * b for a, b in itertools.pairwise(widths))  # actor and critics
    if num_bytes > MAX_PARAMETER_BYTES:
        raise ValueError(
            f"policy.json describes networks of {num_bytes:,} bytes, more than the "
            f"{MAX_PARAMETER_BYTES:,} that they may have"
        )
    return PolicyNetworks(d)


def _fill(networks: PolicyNetworks, parameters: bytes) -> None:
    """Loads the parameters. Raises `ValueError` if they do not fit."""
    try:
        tensors = safetensors.torch.load(parameters)
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is not a whole safetensors file ({error})") from error
    expected = {name: p.shape for name, p in networks.state_dict().items()}
    wrong = sorted(expected.keys() ^ tensors.keys())
    if wrong:
        raise ValueError(f"these tensors are missing or foreign: {', '.join(wrong[:4])}")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.dtype != torch.float32 or tensor.shape != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, but policy.json describes "
                f"torch.float32 {list(shape)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has a NaN or an infinite parameter")
        if name == "observations.variance" and (tensor < 0).any():
            raise ValueError(f"{name} has a number below 0")
    networks.load_state_dict(tensors)
    networks.requires_grad_(False).eval()
