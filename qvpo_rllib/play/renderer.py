"""Which of MuJoCo's offscreen renderers works on this machine.

MuJoCo reads MUJOCO_GL once, when it is first imported, and a renderer that does not work may end
the process: each is tried in a process of its own, and nothing here imports MuJoCo.
"""

import os
import subprocess
import sys

RENDERERS = ("egl", "osmesa")
VARIABLE = "MUJOCO_GL"
PROBE_TIMEOUT_S = 120
PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><light/></worldbody></mujoco>")
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(mujoco.MjData(model))
assert renderer.render().shape == (16, 16, 3)
"""


def choose_renderer() -> str:
    """Returns the first renderer that works, EGL (GPU or software) before OSMesa (software).

    If MUJOCO_GL is set, it is the only one tried.

    Raises:
        ValueError: none works; the message names the packages to install.
    """
    asked = os.environ.get(VARIABLE)
    tried = (asked,) if asked else RENDERERS
    reasons = []
    for name in tried:
        reason = _failure(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise ValueError(
        f"No picture can be rendered on this machine ({'; '.join(reasons)}). Install a renderer "
        "that needs no display, on Debian or Ubuntu `apt-get install libegl1` (EGL) or `apt-get "
        f"install libosmesa6` (OSMesa, software), and leave {VARIABLE} unset"
        + (f" (it is {asked!r})" if asked else "")
        + "; nothing was written."
    )


def _failure(name: str) -> str | None:
    """Returns why the renderer does not work, in a line; None if it does."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE],
            env={**os.environ, VARIABLE: name},
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_TIMEOUT_S} s"
    if probe.returncode == 0:
        return None
    lines = [line for line in probe.stderr.splitlines() if line and not line.startswith(" ")]
    errors = [line for line in lines if "Error" in line and "Exception ignored" not in line]
    return (errors or lines or [f"exit code {probe.returncode}"])[0][:200]
