"""`qvpo record`: a tiny checkpoint's policy on video, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest

from qvpo_rllib import cli
from qvpo_rllib.play import renderer


@pytest.fixture(scope="module")
def checkpoint(build_shared, tiny_config, tmp_path_factory):
    """A trained policy of InvertedPendulum-v5, whose episodes last some 5 to 30 steps."""
    algorithm = build_shared(tiny_config())
    algorithm.train()
    return Path(algorithm.save(str(tmp_path_factory.mktemp("checkpoint"))).checkpoint.path)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """The command chooses MUJOCO_GL for its process; each test has its own."""
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")


@pytest.fixture(scope="module")
def video(checkpoint, tmp_path_factory):
    """Two episodes as a newcomer records them, in a process of its own: the file and the output."""
    out = tmp_path_factory.mktemp("video") / "two.mp4"
    return out, qvpo("record", str(checkpoint), "--episodes", "2", "--seed", "3", "--out", str(out))


def qvpo(*arguments, **environment):
    """Exit code, standard output and standard error of `qvpo`."""
    clean = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    run = subprocess.run(
        [sys.executable, "-m", "qvpo_rllib", *arguments],
        capture_output=True,
        text=True,
        env={**clean, **environment},
        timeout=300,
        check=False,
    )
    return run.returncode, run.stdout, run.stderr


def frames_of(file):
    with imageio.get_reader(file) as reader:
        return np.stack([frame[..., :3] for frame in reader])


def test_the_video_has_a_frame_of_every_step(video):
    out, (code, printed, error) = video
    assert code == 0, error
    lengths = [int(line.split()[-1]) for line in printed.splitlines() if " length " in line]
    assert len(lengths) == 2
    frames = frames_of(out)
    assert len(frames) == sum(lengths) + 2  # and one of each episode's beginning
    assert f"{len(frames)} frames" in printed
    assert [p.name for p in out.parent.iterdir()] == ["two.mp4"]


def test_the_picture_moves_and_has_the_text(video):
    frames = frames_of(video[0]).astype(int)
    corner = frames[:, :60, :330]
    assert (corner.min(axis=3).max(axis=(1, 2)) > 230).all()  # white letters
    assert (corner.max(axis=3).min(axis=(1, 2)) < 40).all()  # with black edges
    assert np.abs(frames[1:, 100:] - frames[:-1, 100:]).max() > 60


def test_the_same_seed_gives_the_same_frames_and_another_seed_others(checkpoint, tmp_path):
    files = [tmp_path / f"{i}.gif" for i in range(3)]
    for file, seed in zip(files, ("7", "7", "8"), strict=True):
        assert cli.main(["record", str(checkpoint), "--seed", seed, "--out", str(file)]) == 0
    first, again, other = (frames_of(file) for file in files)
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_the_episode_is_the_one_that_evaluate_plays(checkpoint, tmp_path, capsys):
    arguments = [str(checkpoint), "--episodes", "1", "--seed", "5", "--k", "2"]
    assert cli.main(["evaluate", *arguments]) == 0
    words = capsys.readouterr().out.split("episode")[1].split()
    evaluated = words[words.index("return") + 1], words[words.index("length") + 1]
    assert cli.main(["record", *arguments, "--out", str(tmp_path / "one.mp4")]) == 0
    printed = capsys.readouterr().out
    assert f"return {evaluated[0]}   length {evaluated[1]}" in printed
    assert "best of K = 2 actions, seed 5" in printed


def test_without_a_renderer_the_packages_are_named(checkpoint, tmp_path):
    """A renderer that is asked for but does not exist, and none at all (a broken loader)."""
    out = tmp_path / "video.mp4"
    code, _, error = qvpo("record", str(checkpoint), "--out", str(out), MUJOCO_GL="nonsense")
    assert code == 2
    for words in ("No picture can be rendered", "'nonsense'", "libegl1", "libosmesa6"):
        assert words in " ".join(error.split())
    assert not list(tmp_path.iterdir())


def test_every_renderer_is_tried_and_none_hides_its_reason(monkeypatch):
    """PYOPENGL_PLATFORM=glx contradicts both, so that neither can start."""
    monkeypatch.setenv("PYOPENGL_PLATFORM", "glx")
    with pytest.raises(ValueError, match=r"egl: .*; osmesa: .*apt-get install libegl1"):
        renderer.choose_renderer()


def test_a_renderer_that_was_asked_for_is_kept(monkeypatch):
    works = renderer.choose_renderer()
    monkeypatch.setenv("MUJOCO_GL", works)
    assert renderer.choose_renderer() == works


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.mp4", "exists already"),
        ("video.avi", "must end in .mp4 or .gif"),
        ("missing/video.mp4", "there is no directory"),
    ],
)
def test_an_output_that_cannot_be_is_refused(name, message, checkpoint, tmp_path, capsys):
    (tmp_path / "there.mp4").write_text("mine")
    out = tmp_path / name
    assert cli.main(["record", str(checkpoint), "--out", str(out)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "there.mp4").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["there.mp4"]


@pytest.mark.parametrize("option", ["--episodes", "--k"])
def test_bad_numbers_leave_nothing_behind(option, checkpoint, tmp_path, capsys):
    out = tmp_path / "video.mp4"
    assert cli.main(["record", str(checkpoint), option, "0", "--out", str(out)]) == 2
    assert f"{option} 0 is not allowed" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path, capsys):
    out = tmp_path / "video.mp4"
    assert cli.main(["record", str(tmp_path), "--out", str(out)]) == 2
    assert "is not a QVPO checkpoint" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
