"""The same update and the same acting, written the obvious way in plain PyTorch.

The yardstick of `qvpo bench` and an independent implementation for the tests: every input is
concatenated, states are repeated for their samples, Mish is the library's, the time embedding is
computed for every row, the reverse process gathers its constants by step. It takes the parameters
of `QVPONetworks` and the noise of `UpdateNoise`, and must arrive at the same numbers.
"""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qvpo_rllib.core.diffusion import NoiseSchedule
from qvpo_rllib.core.networks import TIME_DIM, sinusoidal_embedding
from qvpo_rllib.core.options.qvpo import QVPOHyperparameters
from qvpo_rllib.core.qvpo import QVPONetworks, UpdateNoise
from qvpo_rllib.core.replay import Transitions

# The options that this implementation follows; of the others it does what their defaults say.
FOLLOWED = (
    *("hidden", "actor_lr", "critic_lr", "adam_eps", "grad_clip", "gamma", "tau", "batch_size"),
    *("diffusion_steps", "noise_schedule", "k_target", "num_policy_samples", "num_uniform_samples"),
)


def as_followed(hp: QVPOHyperparameters) -> QVPOHyperparameters:
    """Returns the hyperparameters that `Straightforward` follows, the others at their defaults."""
    followed = {name: getattr(hp, name) for name in FOLLOWED}
    if hp.entropy_weight != "auto":
        followed["entropy_weight"] = hp.entropy_weight
    return QVPOHyperparameters(**followed, engine="eager")


def mlp(linears: list[nn.Linear]) -> nn.Sequential:
    """Returns copies of these layers with Mish between them."""
    layers: list[nn.Module] = []
    for linear in linears:
        layers += [copy.deepcopy(linear), nn.Mish()]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    def __init__(self, networks: QVPONetworks, *, target: bool) -> None:
        super().__init__()
        source = networks.target_actor if target else networks.actor
        self.time_mlp = copy.deepcopy(source.time_mlp)
        self.net = mlp(source.mlp.linears())

    def forward(self, x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        time = self.time_mlp(sinusoidal_embedding(t, TIME_DIM))
        out: Tensor = self.net(torch.cat([x, time, obs], dim=-1))
        return out


class Critic(nn.Module):
    def __init__(self, networks: QVPONetworks, *, target: bool) -> None:
        super().__init__()
        source = networks.target_critic if target else networks.critic
        self.q1, self.q2 = mlp(source.q1.linears()), mlp(source.q2.linears())

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([obs, action], dim=-1)
        return self.q1(both).squeeze(-1), self.q2(both).squeeze(-1)

    def lower(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.minimum(*self(obs, action))


class Straightforward:
    """QVPO with the hyperparameters' defaults that concern the update's form (`qadv`, best of one).

    Args:
        networks: whose parameters are copied.
    """

    def __init__(self, networks: QVPONetworks, hp: QVPOHyperparameters) -> None:
        self.hp = hp
        self.act_dim = networks.act_dim
        self.device = next(networks.parameters()).device
        self.schedule: NoiseSchedule = networks.schedule
        self.actor = Actor(networks, target=False)
        self.critic = Critic(networks, target=False)
        self.target_actor = Actor(networks, target=True)
        self.target_critic = Critic(networks, target=True)
        self.actor_optimizer = torch.optim.Adam(
            self.actor.parameters(), lr=hp.actor_lr, eps=hp.adam_eps
        )
        self.critic_optimizer = torch.optim.Adam(
            self.critic.parameters(), lr=hp.critic_lr, eps=hp.adam_eps
        )

    @torch.no_grad()
    def sample(self, actor: Actor, obs: Tensor, noise: Tensor) -> Tensor:
        """Returns one action per row: obs [R, O], noise [T, R, A] → [R, A] in [-1, 1]."""
        s, x = self.schedule, noise[0]
        for i, step in enumerate(reversed(range(s.diffusion_steps))):
            t = torch.full((x.shape[0],), step, dtype=torch.int64, device=x.device)
            predicted = actor(x, t, obs)
            x0 = s.sqrt_recip_alphas_cumprod.gather(0, t)[:, None] * x
            x0 = x0 - s.sqrt_recipm1_alphas_cumprod.gather(0, t)[:, None] * predicted
            x0 = x0.clamp(-1, 1)
            mean = s.posterior_mean_coef1.gather(0, t)[:, None] * x0
            mean = mean + s.posterior_mean_coef2.gather(0, t)[:, None] * x
            sigma = s.posterior_variance.gather(0, t)[:, None].sqrt()
            x = mean + sigma * noise[i + 1] if step > 0 else mean
        return x.clamp(-1, 1)

    @torch.no_grad()
    def select(self, actor: Actor, critic: Critic, obs: Tensor, noise: Tensor) -> Tensor:
        """Returns the best of K actions: obs [B, O], noise [T, B, K, A] → [B, A]."""
        steps, num_states, k, act_dim = noise.shape
        rows = obs.repeat_interleave(k, dim=0)
        actions = self.sample(actor, rows, noise.reshape(steps, -1, act_dim))
        q = critic.lower(rows, actions).view(num_states, k)
        best = q.argmax(dim=1)
        return actions.view(num_states, k, act_dim)[
            torch.arange(num_states, device=obs.device), best
        ]

    def update(
        self, critic_batch: Transitions, policy_batch: Transitions, noise: UpdateNoise
    ) -> dict[str, Tensor]:
        """Updates critics, actor and targets, in this order; returns the two losses."""
        critic_loss = self._update_critic(critic_batch, noise)
        actor_loss = self._update_policy(policy_batch.obs, noise)
        with torch.no_grad():
            for target, online in (
                (self.target_actor, self.actor),
                (self.target_critic, self.critic),
            ):
                for p, q in zip(target.parameters(), online.parameters(), strict=True):
                    p.copy_(self.hp.tau * q + (1 - self.hp.tau) * p)
        return {"critic_loss": critic_loss.detach(), "actor_loss": actor_loss.detach()}

    def _update_critic(self, batch: Transitions, noise: UpdateNoise) -> Tensor:
        with torch.no_grad():
            next_action = self.select(
                self.target_actor, self.target_critic, batch.next_obs, noise.target
            )
            next_q = self.target_critic.lower(batch.next_obs, next_action)
            target = batch.reward + self.hp.gamma * (1 - batch.terminal) * next_q
        q1, q2 = self.critic(batch.obs, batch.action)
        loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        self._descend(loss, self.critic, self.critic_optimizer)
        return loss

    def _update_policy(self, obs: Tensor, noise: UpdateNoise) -> Tensor:
        hp, act_dim, num_states = self.hp, self.act_dim, obs.shape[0]
        num_samples, num_uniform = hp.num_policy_samples, hp.num_uniform_samples
        rows = obs.repeat_interleave(num_samples, dim=0)
        flat = noise.policy.reshape(hp.diffusion_steps, -1, act_dim)
        samples = self.sample(self.actor, rows, flat)
        with torch.no_grad():
            q = self.critic.lower(rows, samples).view(num_states, num_samples)
        best_q, best = q.max(dim=1)
        rows = torch.arange(num_states, device=obs.device)  # from the host it would wait for one
        chosen = samples.view(num_states, num_samples, act_dim)[rows, best]
        weight = (best_q - q.mean(dim=1)).clamp(min=0)
        actions = torch.cat([chosen, noise.uniform.reshape(-1, act_dim)])
        states = torch.cat([obs, obs.repeat_interleave(num_uniform, dim=0)])
        weights = torch.cat(
            [weight, (float(hp.entropy_weight) * weight).repeat_interleave(num_uniform, dim=0)]
        )
        t, s = noise.step, self.schedule
        noisy = s.sqrt_alphas_cumprod.gather(0, t)[:, None] * actions
        noisy = noisy + s.sqrt_one_minus_alphas_cumprod.gather(0, t)[:, None] * noise.forward
        error = (self.actor(noisy, t, states) - noise.forward).square().mean(dim=-1)
        loss: Tensor = (weights * error).mean()
        self._descend(loss, self.actor, self.actor_optimizer)
        return loss

    def _descend(self, loss: Tensor, module: nn.Module, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.hp.grad_clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), self.hp.grad_clip)
        optimizer.step()

    def load_parameters(self, networks: QVPONetworks) -> None:
        """Writes this implementation's parameters into `networks`, to compare them."""
        pairs = (
            (self.actor, networks.actor),
            (self.target_actor, networks.target_actor),
            (self.critic, networks.critic),
            (self.target_critic, networks.target_critic),
        )
        with torch.no_grad():
            for mine, theirs in pairs:
                for p, q in itertools.zip_longest(mine.parameters(), theirs.parameters()):
                    q.copy_(p)
