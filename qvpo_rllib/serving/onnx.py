"""The policy as an ONNX graph: T reverse steps unrolled, the best of K by the critics at the end.

    inputs    observations [B, O] float32; noise [T, B, K, A] float32, standard normal
    outputs   actions [B, A] float32 in the environment's box; q [B] float32, of the critics

B and K are free. The noise is an input so that the graph holds no randomness of its own.
"""

import importlib.util
import logging
import warnings

import torch
from torch import Tensor, nn

from qvpo_rllib.serving.bundle import build_networks
from qvpo_rllib.serving.description import Description
from qvpo_rllib.serving.policy import PolicyNetworks

PACKAGES = ("onnx", "onnxscript")
OPSET = 18  # ONNX's version of operators


class OnnxPolicy(nn.Module):
    """`core.sampler.ActionSelector.act` in plain operations: nothing in place, no chunks."""

    low: Tensor
    high: Tensor
    time_part: Tensor

    def __init__(self, description: Description, networks: PolicyNetworks) -> None:
        super().__init__()
        self.networks = networks
        for name, bound in (("low", description.act_low), ("high", description.act_high)):
            self.register_buffer(name, torch.tensor(bound, dtype=torch.float32))
        self.register_buffer("time_part", networks.actor.time_part().detach())

    def forward(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        actor, critic, schedule = (
            self.networks.actor,
            self.networks.critic,
            self.networks.schedule,
        )
        observations = self.networks.normalize(observations)
        obs_part = actor.obs_part(observations)[:, None]  # [B, 1, H]
        x = noise[0]
        for i, t in enumerate(reversed(range(schedule.diffusion_steps))):
            pre = actor.mlp.first(0, x) + self.time_part[t] + obs_part
            step_noise = noise[i + 1] if t > 0 else None
            x = schedule.p_sample(x, t, actor.mlp.tail(pre), step_noise)
        candidates = x.clamp(-1, 1)  # [B, K, A]
        q = critic.value(critic(observations[:, None], candidates))  # [B, K]
        top_q, top = q.max(dim=1, keepdim=True)
        best = candidates.gather(1, top[..., None].expand(-1, -1, candidates.shape[2]))[:, 0]
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        actions = torch.minimum(torch.maximum(middle + half * best, self.low), self.high)
        return actions, top_q[:, 0]


def check_available() -> None:
    """Raises `ValueError` where the packages of the extra are missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"ONNX needs {' and '.join(missing)}, not installed here: pip install "
            "'qvpo_rllib[onnx]', or export without --onnx."
        )


def to_onnx(description: Description, parameters: bytes) -> bytes:
    """Returns the bytes of `policy.onnx` for the parameters of a bundle.

    Raises:
        ValueError: the extra's packages are missing, or the parameters do not fit.
    """
    check_available()
    module = OnnxPolicy(description, build_networks(description, parameters)).eval()
    # Two of each: a size of one would be taken for a constant.
    example = (
        torch.zeros(2, description.obs_dim),
        torch.zeros(description.diffusion_steps, 2, 2, description.act_dim),
    )
    batch, k = torch.export.Dim("batch", min=1), torch.export.Dim("k", min=1)
    for logger in ("torch.onnx", "onnxscript"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            example,
            input_names=["observations", "noise"],
            output_names=["actions", "q"],
            dynamic_shapes=({0: batch}, {1: batch, 2: k}),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content
