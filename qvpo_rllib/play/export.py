"""From an RLlib checkpoint to a bundle: the code behind `qvpo export`."""

from pathlib import Path

from qvpo_rllib.play.trained_policy import find_checkpoint, read_checkpoint
from qvpo_rllib.serving.bundle import check_absent, write_bundle
from qvpo_rllib.serving.description import Description


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    version: str | None = None,
    onnx: bool = False,
) -> Description:
    """Writes a checkpoint's policy as a bundle.

    Loading a checkpoint unpickles it, which runs code: export only your own.

    Args:
        path: a checkpoint or a run directory (its best).
        out: the bundle's directory, which must not exist.
        name: under which it will be served; the environment's id if None.
        version: of the model; the beginning of the parameters' SHA-256 if None.
        onnx: also write `policy.onnx`.

    Raises:
        ValueError: no QVPO checkpoint, `out` exists, a name that is not allowed, or no ONNX here.
    """
    check_absent(out.expanduser().absolute())
    if onnx:
        from qvpo_rllib.serving.onnx import check_available

        check_available()
    description, parameters = read_checkpoint(find_checkpoint(path), name=name, version=version)
    onnx_bytes = None
    if onnx:
        from qvpo_rllib.serving.onnx import to_onnx

        onnx_bytes = to_onnx(description, parameters)
    write_bundle(out, description, parameters, onnx_bytes)
    return description
