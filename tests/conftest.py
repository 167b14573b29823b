"""What the tests that need Ray share: one Ray in each test process, and tiny configurations."""

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent

# Before Ray and PyTorch are imported, and inherited by every process that a test starts.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # a busy machine
# As in cluster/kuberay-service.yaml.
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "qvpo_rllib.serving.api:proxy_middlewares"
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ.pop("RAY_ADDRESS", None)

# A script's `pytest … &` ignores Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Who forgets the fixture `ray_session` gets an error, not another Ray with other resources, in
# which a test waits for ever. Ray reads this once; examples that tests start may still rely on it.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
import ray  # noqa: E402

del os.environ["RAY_ENABLE_AUTO_CONNECT"]

TINY = {
    "hidden": (16,),
    "diffusion_steps": 3,
    "num_policy_samples": 4,
    "num_uniform_samples": 2,
    "k_eval": 4,
    "batch_size": 16,
    "warmup_steps": 40,
    "replay_capacity": 2000,
    "engine": "eager",  # compiling takes longer than most tests; tests/test_core_engine.py does it
}


# The files that take longest come first, lest one worker do them while the other has nothing left.
LONGEST = (
    "test_tune_run",
    "test_tune_interrupt",
    "test_faults",
    "test_cli",
    "test_algorithms",
    "test_two_nodes",
    "test_core_engine",
    "test_exact_resume",
)


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # of pytest-xdist: by the number of tests in a file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; there is none here"))


_STARTED: list[subprocess.Popen[str]] = []


def start_qvpo(
    *arguments: str, stderr: int = subprocess.PIPE, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """`qvpo` as the leader of its process group, as in a terminal. It does not outlive the test.

    What a module's fixture starts, it ends itself.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "qvpo_rllib", *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=env,
        start_new_session=True,
    )
    _STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _end_what_the_test_started() -> Iterator[None]:
    """A command that a failed test left would take the cores from the others."""
    before = len(_STARTED)  # after the module's fixtures
    yield
    for process in _STARTED[before:]:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The one Ray of a test process, on loopback. Commands that tests call do not end it."""
    from qvpo_rllib.ray_session import LOOPBACK

    for tries_left in (3, 2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=False,
                _node_ip_address=LOOPBACK,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
            break
        except Exception as error:  # Ray's has no type of its own
            # Ray gives up after 30 s, and pytest would repeat that for each test of the process.
            if "timed out during startup" not in str(error) or not tries_left:
                raise
    # Ray's handler raises an exception: to end the tests would fail one test, and they would go on.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "shutdown", lambda: None)
        yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_address(ray_session: None) -> str:
    """`--address` of the session's Ray, for commands whose own start of one is shown elsewhere."""
    address: str = ray.get_runtime_context().gcs_address
    return address


@pytest.fixture(scope="session")
def qvpo(ray_session: None) -> Callable[..., str]:
    """`qvpo(*arguments)`: what a command prints that ends with exit code `code`.

    It runs in this process, on the tests' Ray: neither has to be started.
    """
    from qvpo_rllib import cli

    def run(*arguments: str, code: int = 0) -> str:
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            for command in ("train", "tune"):
                patch.setattr(f"qvpo_rllib.cli.{command}._start_ray", lambda *_: None)
            assert cli.main([*arguments]) == code, printed.getvalue()
        return printed.getvalue()

    return run


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """`tiny_config(env, **training)`: a configuration whose iteration is 60 env steps.

    It has no evaluation; `config.evaluation(evaluation_interval=1, …)` adds one.
    """
    from qvpo_rllib import QVPOConfig

    def make(env: str = "InvertedPendulum-v5", **training: Any) -> QVPOConfig:
        config = QVPOConfig().environment(env).training(**{**TINY, **training})
        config.reporting(min_sample_timesteps_per_iteration=60)
        config.debugging(seed=0, log_level="ERROR")
        config.evaluation(evaluation_interval=None, evaluation_duration=2)
        return config

    return make


@pytest.fixture(scope="module")
def build_shared(ray_session: None) -> Iterator[Callable[[Any], Any]]:
    """`build_shared(config)`: an algorithm that lives until the module's tests have ended."""
    yield from _build_and_stop()


@pytest.fixture(scope="module")
def save_trained(build_shared: Any, tmp_path_factory: Any) -> Callable[[Any], Path]:
    """`save_trained(config)`: a checkpoint after one iteration."""

    def make(config: Any) -> Path:
        algorithm = build_shared(config)
        algorithm.train()
        directory: Path = tmp_path_factory.mktemp("trained") / "checkpoint"
        algorithm.save(str(directory))
        return directory

    return make


@pytest.fixture
def build(ray_session: None) -> Iterator[Callable[[Any], Any]]:
    """`build(config)`: an algorithm that is stopped at the test's end, however it ends."""
    yield from _build_and_stop()


def _build_and_stop() -> Iterator[Callable[[Any], Any]]:
    algorithms = []

    def make(config: Any) -> Any:
        algorithms.append(config.build_algo())
        return algorithms[-1]

    yield make
    for algorithm in algorithms:
        algorithm.stop()
