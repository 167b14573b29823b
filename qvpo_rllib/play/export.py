"""From a checkpoint to a bundle: the code behind `qvpo export`."""

from pathlib import Path

from qvpo_rllib.algorithms.export import export_policy
from qvpo_rllib.algorithms.qvpo import QVPOTorchPolicy
from qvpo_rllib.play.trained_policy import find_checkpoint, load_checkpoint
from qvpo_rllib.serving.bundle import check_absent
from qvpo_rllib.serving.description import Description
from qvpo_rllib.serving.onnx import check_available


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    version: str | None = None,
    onnx: bool = False,
) -> Description:
    """Writes a checkpoint's policy as a bundle, and returns the bundle's description.

    Loading a checkpoint unpickles it, which runs code: export only your own.

    Args:
        path: a checkpoint or a run directory (its best).
        out: the bundle's directory, which must not exist.
        name: under which it will be served; the environment's id if None.
        version: of the model; the beginning of the parameters' SHA-256 if None.
        onnx: also write `policy.onnx`.

    Raises:
        ValueError: no QVPO checkpoint, damaged, `out` exists, a name that is not allowed, or no
            ONNX here.
    """
    check_absent(out.expanduser().absolute())
    if onnx:
        check_available()
    directory = find_checkpoint(path)
    metadata, policy = load_checkpoint(directory)
    if not isinstance(policy, QVPOTorchPolicy):
        raise ValueError(
            f"{str(directory)!r} is a checkpoint of {metadata.algorithm}: bundles are made of "
            "QVPO's policies alone. `qvpo evaluate` and `qvpo record` play it."
        )
    return export_policy(
        policy,
        metadata,
        out,
        name=name,
        version=version,
        run=directory.parents[1].name if directory.parent.name == "checkpoints" else None,
        checkpoint=directory.name,
        onnx=onnx,
    )
