"""What the two optimisers descend, composed from `losses`: functions of modules and tensors.

They stand apart from the learner so that an engine can hand in compiled ones.
"""

import torch
from torch import Tensor

from qvpo_rllib.core import losses
from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.networks import NoisePredictor, TwinQ


def critic_objective(
    critic: TwinQ, obs: Tensor, action: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """The critics' loss and the mean of their estimates: obs [B, O], action [B, A], target [B]."""
    q = critic(obs, action)
    return losses.critic_loss(q, target), q.detach().mean()


def denoising_objective(
    actor: NoisePredictor,
    schedule: NoiseSchedule,
    obs: Tensor,
    action: Tensor,
    step: Tensor,
    noise: Tensor,
) -> Tensor:
    """mean ‖ε - ε_θ(x_t, s, t)‖² / A of obs [B, O], action, noise [B, A] and step [B]."""
    noisy = schedule.q_sample(action, step, noise)
    return losses.denoising_error(actor(noisy, step, actor.obs_part(obs)), noise).mean()


def actor_objective(
    actor: NoisePredictor,
    schedule: NoiseSchedule,
    obs: Tensor,
    chosen: Tensor,
    chosen_weights: Tensor,
    uniform: Tensor,
    uniform_weights: Tensor,
    step: Tensor,
    noise: Tensor,
    reduction: str,
    vlo_coefficient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 6 plus Eq. 10 on the k chosen and the N_e uniform actions of each state.

    Args:
        obs: [B, O].
        chosen, chosen_weights: [B, k, A] and [B, k].
        uniform, uniform_weights: [B, N_e, A] and [B].
        step, noise: [B·(k + N_e)] int64 and [B·(k + N_e), A]; the chosen actions' rows come
            first, state by state, then all the uniform ones.

    Returns:
        The loss, its entropy term, and the mean denoising error: scalars.
    """
    num_chosen, num_uniform = chosen.shape[1], uniform.shape[1]
    actions = torch.cat([chosen.flatten(0, 1), uniform.flatten(0, 1)])
    noisy = schedule.q_sample(actions, step, noise)
    obs_part = actor.obs_part(obs)
    row_part = torch.cat(
        [
            obs_part.repeat_interleave(num_chosen, dim=0),
            obs_part.repeat_interleave(num_uniform, dim=0),
        ]
    )
    error = losses.denoising_error(actor(noisy, step, row_part), noise)
    mean_error = error.detach().mean()
    if vlo_coefficient:
        error = error * schedule.vlo_coefficient[step]
    best_rows = chosen_weights.numel()
    best_term, entropy_term = losses.policy_loss(
        error[:best_rows],
        chosen_weights.flatten(),
        error[best_rows:],
        uniform_weights.repeat_interleave(num_uniform),
        reduction,
    )
    return best_term + entropy_term, entropy_term.detach(), mean_error
