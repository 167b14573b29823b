"""The live status, in a terminal and in a file, and the picture of the learning curve."""

import io
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes

from qvpo_rllib.cli.terminal import write_anything
from qvpo_rllib.training.learning_curve import learning_curve, plot_learning_curve, short_count
from qvpo_rllib.training.status import TrainingStatus


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """What was written, without the codes for colours and cursor movements."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.getvalue())

    def last_panel(self) -> list[str]:
        return self.text().rstrip().splitlines()[-5:]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def plain(clock: Clock, total_env_steps: int = 100_000) -> tuple[TrainingStatus, io.StringIO]:
    stream = io.StringIO()
    return TrainingStatus(total_env_steps, title="Hopper", stream=stream, clock=clock), stream


def test_plain_lines_come_at_most_every_ten_seconds(clock: Clock) -> None:
    status, stream = plain(clock)
    status.start()
    for second in range(1, 41):
        clock.now_s += 1
        status.update(100 * second, 50 * second, None, {})
    status.stop()
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("Hopper: ") for line in lines)
    counts = [re.search(r"([\d,]+)/100,000", line) for line in lines]
    reached = [count.group(1) for count in counts if count]
    assert reached == ["0", "100", "1,100", "2,100", "3,100", "4,000"]
    assert "\x1b" not in stream.getvalue()


def test_a_plain_line_says_rates_eta_return_and_losses(clock: Clock) -> None:
    status, stream = plain(clock)
    status.start(10_000)
    status.update(10_000, 10_000, None, {})
    clock.now_s += 10
    status.update(10_500, 10_250, 123.456, {"critic_loss": 1.5, "actor_loss": float("nan")})
    assert stream.getvalue().splitlines()[-1] == (
        "Hopper: 10,500/100,000 env steps (10%), 50 env steps/s, 25 updates/s, return 123.46, "
        "critic loss 1.5, actor loss nan, ETA 0:29:50"
    )


def test_evaluations_notes_and_the_end_are_always_written(clock: Clock) -> None:
    status, stream = plain(clock)
    status.start()
    status.update(1000, 1000, None, {})
    status.evaluation(1000, 3210.0, 40.0, 10, True)
    status.evaluation(2000, 3100.0, 41.0, 10, False)
    status.note("checkpoint saved")
    clock.now_s += 3723
    status.stop()
    status.stop()
    assert stream.getvalue().splitlines()[-4:] == [
        "Hopper: evaluation at 1,000 env steps: return 3210 +/- 40 over 10 episodes, "
        "the best so far",
        "Hopper: evaluation at 2,000 env steps: return 3100 +/- 41 over 10 episodes",
        "Hopper: checkpoint saved",
        "Hopper: stopped at 1,000/100,000 env steps, after 1:02:03, best 3210 at 1,000",
    ]


def test_the_warm_up_is_named_and_its_speed_not_used_for_the_eta(clock: Clock) -> None:
    status, stream = plain(clock)
    status.start()
    clock.now_s += 10
    status.update(10_000, 0, None, {})
    assert "warming up (random actions), 1000 env steps/s" in stream.getvalue()
    assert "ETA -:--:--" in stream.getvalue()
    clock.now_s += 10
    status.update(10_100, 100, None, {})
    clock.now_s += 10
    status.update(10_200, 200, None, {})
    line = stream.getvalue().splitlines()[-1]
    assert "warming up" not in line
    assert "10 env steps/s, 10 updates/s" in line
    assert f"ETA {89_800 // 10 // 3600}:29:40" in line


def test_rates_forget_what_is_older_than_the_window(clock: Clock) -> None:
    status, stream = plain(clock)
    status.start()
    env_steps = 0
    for second in range(100):
        clock.now_s += 1
        env_steps += 1000 if second < 50 else 10
        status.update(env_steps, env_steps, None, {})
    clock.now_s += 10
    status.update(env_steps + 100, env_steps + 100, None, {})
    assert ", 10 env steps/s, 10 updates/s" in stream.getvalue().splitlines()[-1]


def test_reports_rarer_than_the_window_still_give_a_rate(clock: Clock) -> None:
    status, stream = plain(clock)
    status.start()
    for minute in (1, 2, 3):
        clock.now_s += 60
        status.update(600 * minute, 300 * minute, None, {})
    assert "10 env steps/s, 5 updates/s" in stream.getvalue().splitlines()[-1]


def test_a_stream_that_cannot_write_a_character_gets_a_question_mark(clock: Clock) -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    write_anything(stream)  # as `qvpo` does with its own
    TrainingStatus(10, title="T", stream=stream, clock=clock).note("β = 1")
    assert buffer.getvalue() == b"T: ? = 1\n"


def test_no_steps_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="total_env_steps=0 is not allowed: it must be 1 or more"):
        TrainingStatus(0, title="Hopper")


def test_the_panel_in_a_terminal_of_80_columns(clock: Clock, terminal: Terminal) -> None:
    status = TrainingStatus(1_000_000, title="Hopper-v5 seed 1", stream=terminal, clock=clock)
    status.start()
    status.update(0, 1, None, {})
    clock.now_s += 20
    status.update(500_000, 250_001, 2100.0, {"critic_loss": 1.5, "actor_loss": 0.25})
    status.evaluation(480_000, 3400.0, 30.0, 10, True)
    status.evaluation(500_000, 3210.0, 40.0, 10, False)
    status.note("[bold]not markup[/bold]")
    status.stop()
    title, bar, rates, training, evaluations = terminal.last_panel()
    assert title.split("   ")[:2] == ["Hopper-v5 seed 1", "running 0:00:20"]
    assert re.match(r"━+.* 50% 500,000/1,000,000 env steps ETA 0:00:20$", bar)
    assert rates.rstrip() == "2.5e+04 env steps/s   1.25e+04 updates/s"
    assert training.rstrip() == "training return 2100   critic loss 1.5   actor loss 0.25"
    assert evaluations.rstrip() == "evaluation 3210 +/- 40   best 3400 at 480,000"
    lines = terminal.text().replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    above = [line.rstrip() for line in lines]
    assert "[bold]not markup[/bold]" in above
    assert any(line.startswith("evaluation at 480,000 env steps: return 3400") for line in above)


def test_the_panel_keeps_its_height_when_texts_are_too_long(
    clock: Clock, terminal: Terminal
) -> None:
    status = TrainingStatus(10**9, title="x" * 200, stream=terminal, clock=clock)
    status.start(5, best_return=12.0)
    status.update(10, 0, 1.0, {f"loss_{i}": 1.0 for i in range(30)})
    status.stop()
    title, bar, rates, training, evaluations = terminal.last_panel()
    assert title == "x" * 79 + "…"
    assert bar.rstrip().endswith("0% 10/1,000,000,000 env steps ETA -:--:--")
    assert rates.rstrip() == "measuring the speed"
    assert training.endswith("…")
    assert evaluations.rstrip() == "no evaluation yet   best 12"


def test_the_warm_up_is_shown_in_a_terminal(clock: Clock, terminal: Terminal) -> None:
    status = TrainingStatus(1000, title="Hopper", stream=terminal, clock=clock)
    status.start()
    status.stop()
    assert terminal.last_panel()[0].rstrip().endswith("warming up (random actions)")


def rows(count: int) -> list[dict[str, float | None]]:
    """Evaluations at 1k, 2k, ... with a best at 3k if there are so many; training in between."""
    returns = [10.0, 20.0, 90.0, 40.0, 50.0]
    return [
        {"env_steps": 500, "episode_return_mean": 1.0},
        *(
            {
                "env_steps": 1000 * (i + 1),
                "evaluation/return_mean": returns[i],
                "evaluation/return_std": 5.0,
                "episode_return_mean": None if i == 1 else returns[i] / 2,
            }
            for i in range(count)
        ),
        {"env_steps": 6000, "evaluation/return_mean": float("nan")},
    ]


def lines_of(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
    }


def test_the_curve_shows_training_evaluations_band_and_best() -> None:
    (axes,) = learning_curve(rows(5), title="Hopper-v5").axes
    lines = lines_of(axes)
    assert lines == {
        "training episodes (mean)": ([500, 1000, 3000, 4000, 5000], [1, 5, 45, 20, 25]),
        "evaluation (mean ± 1 std)": ([1000, 2000, 3000, 4000, 5000], [10, 20, 90, 40, 50]),
        "best evaluation": ([3000], [90]),
    }
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (5.0, 95.0)
    assert [text.get_text() for text in axes.texts] == ["90 at 3k"]
    assert axes.get_title() == "Hopper-v5"
    assert axes.get_xlabel() == "environment steps"
    assert axes.get_ylabel() == "return (sum of rewards per episode)"
    legend = axes.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == set(lines)


def test_one_evaluation_has_an_error_bar_and_none_an_empty_frame() -> None:
    (axes,) = learning_curve(rows(1), title="").axes
    (bar,) = axes.containers
    (segments,) = bar.lines[2][0].get_segments()
    np.testing.assert_array_equal(segments, [[1000, 5], [1000, 15]])
    (axes,) = learning_curve(rows(0), title="").axes
    assert list(lines_of(axes)) == ["training episodes (mean)"]
    (axes,) = learning_curve([], title="").axes
    assert [text.get_text() for text in axes.texts] == ["no episode has ended yet"]
    assert axes.get_legend() is None


@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_picture_is_a_png_of_column_width(tmp_path: Path, count: int) -> None:
    path = tmp_path / "learning_curve.png"
    path.write_bytes(b"the last picture")
    plot_learning_curve(rows(count), path, title="Hopper-v5")
    picture = matplotlib.image.imread(path)
    assert picture.shape == (525, 900, 4)
    assert picture.std() > 0.01
    assert [entry.name for entry in tmp_path.iterdir()] == ["learning_curve.png"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (500, "500"), (10_000, "10k"), (2500, "2.5k"), (1.5e6, "1.5M"), (999_999, "1M")],
)
def test_counts_are_short(count: float, text: str) -> None:
    assert short_count(count) == text
