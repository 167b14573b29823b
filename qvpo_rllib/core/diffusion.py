"""Noise schedules, the forward process and the DDPM reverse process.

Index convention: step index t = 0 … T-1 here is the paper's t = 1 … T. A tensor named
`alphas_cumprod` is the paper's ᾱ.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# This bound on β keeps the cosine schedule's last step from dividing by zero.
MAX_BETA = 0.999


def cosine_betas(diffusion_steps: int, s: float = 0.008) -> Tensor:
    """Returns β [T] float64 of a squared-cosine ᾱ (Nichol & Dhariwal 2021, Eq. 17)."""
    k = torch.linspace(0, 1, diffusion_steps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((k + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, MAX_BETA)


def linear_betas(diffusion_steps: int, first: float = 1e-4, last: float = 2e-2) -> Tensor:
    """Returns β [T] float64 that rises linearly (Ho et al. 2020)."""
    return torch.linspace(first, last, diffusion_steps, dtype=torch.float64)


def vp_betas(diffusion_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> Tensor:
    """Returns β [T] float64 of a variance-preserving SDE in T steps (Xiao et al. 2022)."""
    t = torch.arange(1, diffusion_steps + 1, dtype=torch.float64)
    slope = 0.5 * (beta_max - beta_min) * (2 * t - 1) / diffusion_steps**2
    return 1 - torch.exp(-beta_min / diffusion_steps - slope)


BETAS: dict[str, Callable[[int], Tensor]] = {
    "cosine": cosine_betas,
    "linear": linear_betas,
    "vp": vp_betas,
}


class NoiseSchedule(nn.Module):
    """The constants of a diffusion chain of T steps, each a buffer [T] float32.

    They are computed in float64 and rounded once.

    Raises:
        ValueError: there is no schedule of the name `kind`.
    """

    betas: Tensor
    alphas_cumprod: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    vlo_coefficient: Tensor
    reverse_steps: Tensor  # [T, 5] float64

    def __init__(self, kind: str, diffusion_steps: int) -> None:
        super().__init__()
        if kind not in BETAS:
            raise ValueError(f"The schedule {kind!r} does not exist: use {', '.join(BETAS)}.")
        self.diffusion_steps = diffusion_steps
        betas = BETAS[kind](diffusion_steps)
        alphas = 1 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
        # Deviation: Eq. 4's coefficient divides by σ_t², which is 0 at the last reverse step. As in
        # Improved DDPM, that step borrows its neighbour's variance (β itself when T = 1).
        sigma2 = posterior_variance.clone()
        sigma2[0] = posterior_variance[1] if diffusion_steps > 1 else betas[0]
        constants = {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / alphas_cumprod).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / alphas_cumprod - 1).sqrt(),
            "posterior_variance": posterior_variance,
            "posterior_mean_coef1": betas * previous.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_coef2": (1 - previous) * alphas.sqrt() / (1 - alphas_cumprod),
            "vlo_coefficient": betas**2 / (2 * sigma2 * alphas * (1 - alphas_cumprod)),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)
        # The sampling loop reads the same constants as one row per step, without a gather.
        steps = torch.stack(
            [
                constants["sqrt_recip_alphas_cumprod"],
                constants["sqrt_recipm1_alphas_cumprod"],
                constants["posterior_mean_coef1"],
                constants["posterior_mean_coef2"],
                posterior_variance.sqrt(),
            ],
            dim=1,
        )
        self.register_buffer("reverse_steps", steps, persistent=False)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns x_t ~ q(x_t | x_0), the forward process, Eq. 2: x0, noise [R, A], t [R] int64."""
        return (
            self.sqrt_alphas_cumprod[t, None] * x0
            + self.sqrt_one_minus_alphas_cumprod[t, None] * noise
        )

    def p_sample(
        self, x_t: Tensor, t: int, predicted_noise: Tensor, noise: Tensor | None
    ) -> Tensor:
        """Returns x_{t-1}, one reverse step from x_t; the last one (t = 0) takes no noise."""
        constants = self.reverse_steps[t].to(x_t.dtype).unbind()
        return reverse_step(x_t, predicted_noise, noise, constants)


def predict_x0(x_t: Tensor, predicted_noise: Tensor, constants: Sequence[Tensor]) -> Tensor:
    """Returns x̂_0 of the predicted noise, clipped to [-1, 1]; any shape."""
    recip, recipm1, *_ = constants
    return (recip * x_t - recipm1 * predicted_noise).clamp(-1, 1)


def q_posterior(x0: Tensor, x_t: Tensor, constants: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of q(x_{t-1} | x_t, x_0); any shape."""
    _, _, coef1, coef2, sigma = constants
    return coef1 * x0 + coef2 * x_t, sigma


def reverse_step(
    x_t: Tensor, predicted_noise: Tensor, noise: Tensor | None, constants: Sequence[Tensor]
) -> Tensor:
    """Returns x_{t-1}, any shape, by the constants of a row of `NoiseSchedule.reverse_steps`."""
    mean, sigma = q_posterior(predict_x0(x_t, predicted_noise, constants), x_t, constants)
    return mean if noise is None else mean + sigma * noise
