"""What a captured update is, shown without a GPU.

A CUDA graph keeps what a step's operations were and which memory they touched, and nothing of its
Python. `Recording` keeps the same of a step on a CPU: PyTorch's operations with their very tensors.
A learner whose updates are replayed from it must stay equal to the last bit to one that runs the
step each time, while the replay grows and everything moves that may move without a new capture.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qvpo_rllib.algorithms import ALGORITHMS
from qvpo_rllib.core import engine
from qvpo_rllib.core import learner as learner_module
from qvpo_rllib.core.engine import CudaGraphs
from qvpo_rllib.core.options import options_of
from qvpo_rllib.core.options.shared import OffPolicyHyperparameters
from qvpo_rllib.core.replay import EpisodeSteps, ReplayBuffer, Transitions

OBS, ACT = 5, 3
SIZES = {"hidden": (16, 16), "batch_size": 8, "warmup_steps": 0, "replay_capacity": 100}
MOVING = {"entropy_weight": 0.5, "entropy_weight_end": 0.1, "entropy_decay_steps": 100}
QVPO = {"diffusion_steps": 2, "num_policy_samples": 4, "num_uniform_samples": 2, "k_target": 2}
OPTION_SETS = [
    MOVING,
    {"update_order": "policy_then_critic", "target_actor": False, "entropy_reduction": "mean"},
    {"update_order": "policy_then_critic", "q_weights": "qcut", "noise_schedule": "linear"},
    {"q_weights": "qrelu", "num_chosen_samples": 2, "vlo_coefficient": True, "grad_clip": None},
    {"q_weights": "qexp", "k_target": 1, "num_uniform_samples": 0, "noise_schedule": "vp"},
    {"sampling_precision": "bf16", **MOVING},
    {"n_step": 3, "normalize_observations": True},
    {"critic": "quantile", "num_quantiles": 5},
    {"critic": "quantile", "critic_layer_norm": True, "update_order": "policy_then_critic"},
    {"q_weights": "softmax", "kl_target": 1.0, "entropy_weight": "auto"},
    {"target_refinement": "gradient"},
    {"entropy_in_target": "auto", "entropy_noises": 3},
    {"entropy_in_target": 0.1, "update_order": "policy_then_critic", "target_actor": False},
    {"target_refinement": "guidance", "num_chosen_samples": 2},
    {"policy_interval": 2},
    {"policy_interval": 3, "critic": "quantile", "q_weights": "softmax", "kl_target": 1.0},
    {"policy_interval": 2, "update_order": "policy_then_critic", "target_actor": False},
]
READS_OF_THE_HOST = {"item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__float__",
                     "__int__", "__index__"}  # fmt: skip


class HostRead(RuntimeError):
    """What a CUDA graph cannot capture: the host waits for the device, or its numbers decide a
    shape."""


class _Reads(TorchFunctionMode):
    """Refuses the methods of a tensor that PyTorch answers on a CPU without an operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READS_OF_THE_HOST:
            raise HostRead(function.__name__)
        return function(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """The operations of some steps with the tensors that they read and wrote.

    Recording does the steps, which capturing does not: the first replay has been done by then.
    """

    def __init__(self, steps):
        super().__init__()
        self.calls = []
        with _Reads(), self:
            for step in steps:
                step()
        self.fresh = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            # Of an index, a mask alone makes a shape of numbers.
            masks = [t for t in tensors(args[1:]) if t.dtype == torch.bool]
            if function is not torch.ops.aten.index.Tensor or masks:
                raise HostRead(str(function))
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function.namespace != "profiler":
            self.calls.append((function, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        if not self.fresh:
            for function, args, kwargs, out in self.calls:
                for new, old in zip(tensors(function(*args, **kwargs)), tensors(out), strict=True):
                    if new.data_ptr() != old.data_ptr():  # else a view, or written in place
                        old.data.copy_(new)
        self.fresh = False


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, list | tuple) else []


class Recorded(CudaGraphs):
    def _run_on_side_stream(self, step):
        step()
        self.done_eagerly += 1

    def _capture(self, steps):
        return Recording(steps)

    def close(self):
        self.graphs.clear()


def transitions(count, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((OBS,), (ACT,), (), (OBS,), ())
    obs, action, reward, next_obs, end = (
        torch.randn(count, *shape, generator=generator) for shape in shapes
    )
    return Transitions(obs, action.tanh(), reward, next_obs, (end > 1).float())


@pytest.fixture
def trained(monkeypatch):
    """`trained(recorded, name, options)`: a learner of `--algo name` after 10 updates, and its
    replay. Unless `recorded`, each update runs the step's Python."""
    monkeypatch.setattr(learner_module, "resolve_engine", lambda *_: "cuda_graph")
    monkeypatch.setattr(learner_module, "kernels_of", lambda *_: engine.EAGER)
    monkeypatch.setattr(learner_module, "CudaGraphs", Recorded)
    monkeypatch.setattr(engine, "UPDATES_PER_GRAPH", 2)

    def train(recorded, name="qvpo", options=MOVING, wrap=lambda step: step):
        policy = ALGORITHMS[name].load().policy_class
        own = QVPO if name == "qvpo" else {}
        values = {**SIZES, **own, **options, "actor_lr": 3e-3, "critic_lr": 3e-3}
        hp = ALGORITHMS[name].hyperparameters(**values)
        torch.manual_seed(0)
        networks = policy.networks_class(OBS, ACT, hp)
        learner = policy.learner_class(networks, hp, seed=0, device="cpu")
        learner.update_from = wrap(learner.update_from)
        replay = ReplayBuffer(
            100,
            OBS,
            ACT,
            seed=1,
            device="cpu",
            improves_actions=name == "dipo",
            follows_episodes=hp.n_step > 1,
        )
        for env_steps, new, updates in ((0, 20, 4), (50, 40, 3), (90, 70, 3)):
            batch, numbers = transitions(new, seed=env_steps), np.arange(new)
            steps = EpisodeSteps(env_steps * 100 + numbers // 7, numbers % 7, numbers % 7 == 6)
            replay.add(batch, steps)
            learner.observe(batch.obs)
            learner.set_env_steps(env_steps)
            if env_steps == 90:
                learner.configure(dataclasses.replace(hp, actor_lr=1e-2, critic_lr=1e-3))
            learner.engine = "cuda_graph" if recorded else "eager"
            learner.train(replay, updates)
            learner.engine = "cuda_graph"
        return learner, replay

    return train


def assert_same_bits(one, other):
    (mine, my_replay), (theirs, their_replay) = one, other
    ours, others = mine.state_dict(), theirs.state_dict()
    for name, value in ours["networks"].items():
        assert torch.equal(value, others["networks"][name]), name
    for optimizer in ("actor_optimizer", "critic_optimizer"):
        for number, moments in ours[optimizer]["state"].items():
            for name, value in moments.items():
                assert torch.equal(value, others[optimizer]["state"][number][name]), name
    assert torch.equal(ours["generator"], others["generator"])
    assert torch.equal(my_replay.generator.get_state(), their_replay.generator.get_state())
    assert mine.pop_metrics() == theirs.pop_metrics()


def allow_capture():
    kinds = {name: entry.hyperparameters for name, entry in ALGORITHMS.items()}
    return [
        name
        for name, kind in kinds.items()
        if issubclass(kind, OffPolicyHyperparameters)
        and "cuda_graph" in options_of(kind)["engine"].metadata["choices"]
    ]


@pytest.mark.parametrize("options", OPTION_SETS, ids=lambda options: "-".join(map(str, options)))
@pytest.mark.parametrize("name", allow_capture())
def test_replayed_updates_equal_those_of_the_step(trained, name, options):
    recorded = trained(True, name, options)
    sizes = {size for size, _ in recorded[0]._graphs.graphs}
    assert sizes == {1, engine.UPDATES_PER_GRAPH}
    assert not any(graph.fresh for graph in recorded[0]._graphs.graphs.values())
    assert_same_bits(recorded, trained(False, name, options))


def test_the_option_sets_have_every_word_that_a_captured_update_can_meet():
    elsewhere = {"engine", "sampling_mode"}
    needs_a_gpu = {("sampling_precision", "tf32"), ("ranking_precision", "tf32")}
    (kind,) = (ALGORITHMS[name].hyperparameters for name in allow_capture())
    for name, declared in options_of(kind).items():
        words = set(declared.metadata["choices"]) if name not in elsewhere else set()
        met = {options.get(name, declared.default) for options in OPTION_SETS}
        assert {(name, word) for word in words} - needs_a_gpu <= {(name, word) for word in met}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("td3", {}),
        ("dipo", {"action_steps": 1, "action_clip_ratio": 0.1, "diffusion_steps": 2,
                  "target_actor_interval": 2}),
    ],
)  # fmt: skip
def test_a_step_that_counts_its_updates_cannot_be_captured(trained, name, options):
    """The tests above can fail: these learners branch on `num_updates`, which a capture
    freezes."""
    with pytest.raises(ValueError, match="engine='cuda_graph' does not exist"):
        ALGORITHMS[name].hyperparameters(engine="cuda_graph")
    eager = trained(False, name, options)
    with pytest.raises(AssertionError, match=r"target_|actor|critic"):
        assert_same_bits(trained(True, name, options), eager)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(x),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x > 0),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
    ],
)
def test_a_step_that_asks_the_device_cannot_be_captured(trained, read):
    def wrap(step):
        def asking(replay):
            metrics = step(replay)
            read(metrics["critic_loss"])
            return metrics

        return asking

    with pytest.raises(HostRead):
        trained(True, wrap=wrap)
