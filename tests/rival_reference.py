"""Slow, obvious versions of one update of TD3, DIPO and QSM, in the manner of `reference.py`."""

import numpy as np
import torch
from reference import (
    Adam,
    Update,
    betas,
    clip_gradients,
    constants,
    critic_loss,
    improved_actions,
    loss_and_gradients,
    min_q,
    moving_average,
    predicted_noise,
    sample_actions,
    td_target,
    torch_mlp,
    weights_of,
)

# --- TD3 -------------------------------------------------------------------------------------


def relu_mlp(weights, prefix, x):
    """ReLU between the layers `prefix`.0, `prefix`.1, …: rows of a torch tensor."""
    names = [n for n in weights if n.startswith(prefix + ".") and n.endswith(".weight")]
    for i, name in enumerate(names):
        x = x @ weights[name].T + weights[name.replace(".weight", ".bias")]
        if i < len(names) - 1:
            x = torch.clamp(x, min=0)
    return x


def smoothed_action(action, noise, std, clip):
    """One number at a time."""
    result = np.zeros_like(action)
    for place, a in np.ndenumerate(action):
        added = max(-clip, min(clip, std * noise[place]))
        result[place] = max(-1.0, min(1.0, a + added))
    return result


class TD3Update:
    """Three networks' worth of arithmetic; `number` counts the updates from 1."""

    def __init__(self, networks, hp):
        self.hp = hp
        for part in ("actor", "critic", "target_actor", "target_critic"):
            setattr(self, part, weights_of(getattr(networks, part)))
        self.actor_adam = Adam(hp.actor_lr, hp.adam_eps)
        self.critic_adam = Adam(hp.critic_lr, hp.adam_eps)

    def update(self, batch, noise, number):
        hp = self.hp
        tensors = {n: torch.tensor(w) for n, w in self.target_actor.items()}
        next_action = np.tanh(relu_mlp(tensors, "layers", batch.next_obs).numpy())
        next_action = smoothed_action(
            next_action, noise.numpy(), hp.target_noise, hp.target_noise_clip
        )
        tensors = {n: torch.tensor(w) for n, w in self.target_critic.items()}
        next_input = torch.cat([batch.next_obs, torch.tensor(next_action)], dim=1)
        q1, q2 = (relu_mlp(tensors, f"{q}.layers", next_input)[:, 0] for q in ("q1", "q2"))
        lowest = [min(a, b) for a, b in zip(q1.tolist(), q2.tolist(), strict=True)]
        target = td_target(batch.reward.numpy(), batch.terminal.numpy(), lowest, hp.gamma)
        inputs = torch.cat([batch.obs, batch.action], dim=1)

        def critic_loss_of(weights):
            q1, q2 = (relu_mlp(weights, f"{q}.layers", inputs)[:, 0] for q in ("q1", "q2"))
            return critic_loss(q1, q2, target)

        metrics = {"critic_loss": self._descend("critic", self.critic_adam, critic_loss_of)}
        if number % hp.policy_delay == 0:
            critic = {n: torch.tensor(w) for n, w in self.critic.items()}

            def policy_loss_of(weights):
                action = torch.tanh(relu_mlp(weights, "layers", batch.obs))
                return -relu_mlp(critic, "q1.layers", torch.cat([batch.obs, action], 1)).mean()

            metrics["actor_loss"] = self._descend("actor", self.actor_adam, policy_loss_of)
            self.target_actor = moving_average(self.target_actor, self.actor, hp.tau)
            self.target_critic = moving_average(self.target_critic, self.critic, hp.tau)
        return metrics

    def _descend(self, name, adam, loss_of):
        loss, gradients = loss_and_gradients(loss_of, getattr(self, name))
        adam.descend(getattr(self, name), clip_gradients(gradients, self.hp.grad_clip))
        return loss


# --- What the diffusion rivals share ---------------------------------------------------------


class DiffusionUpdate(Update):
    """Critics and actor as in `reference.Update`, with targets and losses of their own."""

    def __init__(self, networks, hp):
        self.hp = hp
        self.beta = betas(hp.noise_schedule, hp.diffusion_steps)
        for part in ("actor", "critic", "target_actor", "target_critic"):
            setattr(self, part, weights_of(getattr(networks, part)))
        self.actor_adam = Adam(hp.actor_lr, hp.adam_eps)
        self.critic_adam = Adam(hp.critic_lr, hp.adam_eps)

    def fit_critics(self, batch, next_action):
        next_q = min_q(self.target_critic, batch.next_obs.numpy(), next_action[:, None])[:, 0]
        target = td_target(batch.reward.numpy(), batch.terminal.numpy(), next_q, self.hp.gamma)
        inputs = torch.cat([batch.obs, batch.action], dim=1)

        def loss_of(weights):
            return critic_loss(*self.twins(weights, inputs), target)

        return self.descend("critic", self.critic_adam, loss_of)[0]

    def twins(self, weights, inputs):
        return [torch_mlp(weights, f"{q}.layers", inputs)[:, 0] for q in ("q1", "q2")]

    def noisy(self, action, noise):
        """x_t of every row; the package rounds the constants to float32."""
        table = constants(self.hp.noise_schedule, self.hp.diffusion_steps)
        kept = np.float32(table["sqrt_alphas_cumprod"]).astype(float)[noise.step.numpy()]
        added = np.float32(table["sqrt_one_minus_alphas_cumprod"]).astype(float)[noise.step.numpy()]
        return kept[:, None] * action + added[:, None] * noise.forward.numpy()

    def predicted(self, actor, noisy, step, obs):
        time = torch_mlp(actor, "time_mlp", actor["time_table"][step])
        return torch_mlp(actor, "mlp.layers", torch.cat([torch.tensor(noisy), time, obs], dim=1))


# --- DIPO ------------------------------------------------------------------------------------


class DIPOUpdate(DiffusionUpdate):
    def update(self, batch, obs, action, noise, number):
        """Critics on `batch`, actor on `obs` and the improved `action`, which are returned."""
        hp = self.hp
        sampled = sample_actions(
            self.target_actor, self.beta, batch.next_obs.numpy(), noise.target.numpy()
        )
        metrics = {"critic_loss": self.fit_critics(batch, sampled[:, 0])}
        improved = self.improve(obs, action.numpy())
        noisy = self.noisy(improved, noise)

        def loss_of(actor):
            predicted = self.predicted(actor, noisy, noise.step, obs)
            rows = zip(predicted, noise.forward, strict=True)
            return sum(((p - e) ** 2).mean() for p, e in rows) / len(obs)

        metrics["actor_loss"], _ = self.descend(
            "actor", self.actor_adam, loss_of, skip="time_table"
        )
        self.target_critic = moving_average(self.target_critic, self.critic, hp.tau)
        if number % hp.target_actor_interval == 0:
            self.target_actor = moving_average(self.target_actor, self.actor, hp.tau)
        return improved, metrics

    def improve(self, obs, action):
        hp = self.hp
        limit = hp.action_clip_ratio * action.shape[1]
        return improved_actions(
            self.critic, obs.numpy(), action, hp.action_steps, hp.action_lr, limit
        )


# --- QSM -------------------------------------------------------------------------------------


def qsm_sample(actor, beta, obs, noise):
    """The reverse process of QSM's authors, one action at a time: obs [B, O], noise [T, B, A]."""
    steps, bar = len(beta), np.cumprod(1 - beta)
    actions = np.zeros(noise.shape[1:])
    for b in range(len(obs)):
        x = noise[0, b]
        for t in reversed(range(steps)):
            predicted = predicted_noise(actor, x, t, obs[b])
            x = (x - beta[t] / np.sqrt(1 - bar[t]) * predicted) / np.sqrt(1 - beta[t])
            if t > 0:
                x = x + np.sqrt(beta[t]) * noise[steps - t, b]
            x = np.clip(x, -1, 1)
        actions[b] = x
    return actions


class QSMUpdate(DiffusionUpdate):
    def update(self, batch, noise):
        hp = self.hp
        sampled = qsm_sample(self.actor, self.beta, batch.next_obs.numpy(), noise.target.numpy())
        explored = np.clip(sampled + hp.exploration_noise * noise.exploration.numpy(), -1, 1)
        metrics = {"critic_loss": self.fit_critics(batch, explored)}
        noisy = self.noisy(batch.action.numpy(), noise)
        gradient = self.q_gradient(batch.obs, noisy)

        def loss_of(actor):
            predicted = self.predicted(actor, noisy, noise.step, batch.obs)
            rows = zip(predicted, gradient, strict=True)
            score = [((-hp.q_gradient_scale * g - p) ** 2).sum() for p, g in rows]
            return sum(score) / len(score)

        metrics["actor_loss"], _ = self.descend(
            "actor", self.actor_adam, loss_of, skip="time_table"
        )
        self.target_critic = moving_average(self.target_critic, self.critic, hp.tau)
        return metrics

    def q_gradient(self, obs, action):
        """Row by row and twin by twin."""
        critic = {n: torch.tensor(w) for n, w in self.critic.items()}
        rows = []
        for state, a in zip(obs, action, strict=True):
            both = []
            for q in ("q1", "q2"):

                def q_of(leaves, q=q, state=state):
                    inputs = torch.cat([state, leaves["action"]])[None]
                    return torch_mlp(critic, f"{q}.layers", inputs)[0, 0]

                both.append(loss_and_gradients(q_of, {"action": a})[1]["action"])
            rows.append((both[0] + both[1]) / 2)
        return torch.tensor(np.array(rows))
