"""Recording a checkpoint's policy on video: the code behind `qvpo record`.

The policy acts exactly as in `qvpo evaluate`: the same K, scaling, seeds and noise. MUJOCO_GL must
be set (see `renderer`) before this module is imported.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from qvpo_rllib.files import replacing
from qvpo_rllib.play.evaluation import Evaluation, evaluate_checkpoint
from qvpo_rllib.rollout.episodes import Hooks
from qvpo_rllib.rollout.wrapping import FrameSkip, env_steps_of

FORMATS = (".mp4", ".gif")
MAX_FPS = 50  # a GIF cannot be faster; environments that are (Hopper: 125) lose frames, not speed
DEFAULT_FPS = 30  # of an environment that does not say
PACKAGES = ("imageio", "imageio_ffmpeg", "PIL")
FONT_SHARE = 1 / 24  # of the picture's height
MARGIN = 8  # pixels

Frame = NDArray[np.uint8]  # [height, width, 3]


def check_output(path: Path) -> None:
    """Raises `ValueError` unless a video can be written to `path`, where nothing may be yet."""
    if path.suffix not in FORMATS:
        raise ValueError(
            f"--out {str(path)!r} is not allowed: its name must end in {' or '.join(FORMATS)}."
        )
    if os.path.lexists(path):
        raise ValueError(f"{str(path)!r} exists already. Give another --out; nothing was changed.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--out {str(path)!r}: there is no directory {str(path.parent)!r}.")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"Recording needs {', '.join(missing)}: pip install 'qvpo_rllib[video]' (or, in a "
            "checkout, pip install -e '.[video]')."
        )


def record_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    episodes: int = 1,
    k: int | None = None,
    seed: int = 0,
    modules: Sequence[str] = (),
    report: Callable[[int, float], None] | None = None,
) -> tuple[Evaluation, int]:
    """Plays episodes and writes them to the video `out`, one after the other.

    With one episode it is the episode of `evaluate_checkpoint(…, episodes=1)` with the same seed.

    Args:
        modules: as for `evaluate_checkpoint`.
        report: called after each step with the episode (from 0) and its return so far.

    Returns:
        The episodes, and the number of frames written.

    Raises:
        ValueError: as `evaluate_checkpoint`, or `out` cannot be written, or the environment has no
            pictures. Nothing is left behind.
    """
    check_output(out)
    with replacing(out) as temporary:
        recorder = Recorder(temporary, episodes, report)
        try:
            result = evaluate_checkpoint(
                checkpoint,
                episodes=episodes,
                k=k,
                seed=seed,
                modules=modules,
                record=recorder.watch,
            )
        finally:
            recorder.close()
    return result, recorder.num_frames


class Recorder(Hooks):
    """Writes a frame of every step of one environment's episodes: `rollout.Hooks`."""

    def __init__(
        self, path: Path, num_episodes: int, report: Callable[[int, float], None] | None
    ) -> None:
        self._path, self._num_episodes, self._report = path, num_episodes, report
        self._episode, self._acted, self._step, self._return = -1, 0, 0, 0.0
        self._writer: Any = None
        self.num_frames = 0

    def watch(self, env: gym.Env[Any, Any], env_id: str) -> "Recorder":
        """Begins the file. Raises `ValueError` if the environment renders no pictures."""
        if "rgb_array" not in env.metadata.get("render_modes", []):
            raise ValueError(
                f"{env_id} cannot be recorded: it has no render mode 'rgb_array', only "
                f"{env.metadata.get('render_modes', [])}."
            )
        import imageio.v2 as imageio

        self._env, self._env_id = env, env_id
        # A picture is made after each of the policy's steps.
        frame_skip = env.frame_skip if isinstance(env, FrameSkip) else 1
        fps = float(env.metadata.get("render_fps") or DEFAULT_FPS) / frame_skip
        self._stride = math.ceil(fps / MAX_FPS)
        shown_fps = fps / self._stride
        if self._path.suffix == ".gif":
            self._writer = imageio.get_writer(self._path, duration=1000 / shown_fps, loop=0)
        else:
            # One thread and no padding to blocks of 16: the same frames give the same file.
            self._writer = imageio.get_writer(
                self._path, fps=shown_fps, macro_block_size=2, ffmpeg_params=["-threads", "1"]
            )
        return self

    def start(self, i: int, reset: Callable[[], Any]) -> Any:
        first = reset()
        self._episode, self._acted, self._step = self._episode + 1, 0, 0
        self._return = 0.0
        self._write_frame()
        return first

    def step(
        self, i: int, action: NDArray[np.floating], obs: Any, reward: float, info: dict[str, Any]
    ) -> None:
        self._acted += 1
        self._step = env_steps_of(self._env, self._acted)
        self._return += reward
        if self._acted % self._stride == 0:
            self._write_frame()
        if self._report is not None:
            self._report(self._episode, self._return)

    def close(self) -> None:
        """Finishes the file, if one was begun. May be called again."""
        if self._writer is not None:
            self._writer.close()

    def _write_frame(self) -> None:
        frame = np.asarray(self._env.render(), dtype=np.uint8)
        text = (
            f"{self._env_id}   episode {self._episode + 1}/{self._num_episodes}\n"
            f"step {self._step}   return {self._return:.1f}"
        )
        self._writer.append_data(with_text(frame, text))
        self.num_frames += 1


def with_text(frame: Frame, text: str) -> Frame:
    """Returns a copy of `frame` [height, width, 3] with `text` in its upper left corner."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(frame)
    size = max(10, round(frame.shape[0] * FONT_SHARE))
    ImageDraw.Draw(picture).multiline_text(
        (MARGIN, MARGIN),
        text,
        fill="white",
        font=ImageFont.load_default(size),
        stroke_width=2,
        stroke_fill="black",
    )
    return np.asarray(picture)
