"""Slow, obvious versions of every formula of `qvpo_rllib.core`, in numpy and float64.

Nothing here calls the package: networks come in as dictionaries of arrays (`weights_of`), inputs
are concatenated, rows are looped over, and torch serves for one thing only, the gradients of the
losses of `Update`. Letters: B states, N actions per state, A action dimensions, T diffusion steps.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

# --- Noise schedules and the constants derived from them -------------------------------------


def betas(kind, steps):
    """β_1 … β_T of the three schedules, one step at a time: [T]."""
    result = []
    for t in range(1, steps + 1):
        if kind == "cosine":  # Nichol & Dhariwal: f(t)/f(0), s = 0.008, β ≤ 0.999
            now = math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            before = math.cos(((t - 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
            result.append(min(max(1 - now / before, 0.0), 0.999))
        elif kind == "linear":
            share = (t - 1) / (steps - 1) if steps > 1 else 0.0
            result.append(1e-4 * (1 - share) + 2e-2 * share)
        elif kind == "vp":  # the integral of β(u) = 0.1 + 9.9u over the step's share of [0, 1]
            start, end = (t - 1) / steps, t / steps
            integral = 0.1 * (end - start) + 9.9 * (end**2 - start**2) / 2
            result.append(1 - math.exp(-integral))
        else:
            raise ValueError(kind)
    return np.array(result)


def alphas_cumprod(beta):
    """ᾱ_t = (1 - β_1)···(1 - β_t)."""
    result, product = [], 1.0
    for b in beta:
        product *= 1 - b
        result.append(product)
    return np.array(result)


def constants(kind, steps):
    """Every per-step constant under the name the package gives it."""
    beta = betas(kind, steps)
    bar = alphas_cumprod(beta)
    rows = []
    for t in range(steps):
        before = bar[t - 1] if t > 0 else 1.0
        rows.append(
            {
                "betas": beta[t],
                "alphas_cumprod": bar[t],
                "sqrt_alphas_cumprod": math.sqrt(bar[t]),
                "sqrt_one_minus_alphas_cumprod": math.sqrt(1 - bar[t]),
                "sqrt_recip_alphas_cumprod": 1 / math.sqrt(bar[t]),
                "sqrt_recipm1_alphas_cumprod": math.sqrt((1 - bar[t]) / bar[t]),
                "posterior_variance": posterior_variance(beta, t),
                "posterior_mean_coef1": math.sqrt(before) * beta[t] / (1 - bar[t]),
                "posterior_mean_coef2": math.sqrt(1 - beta[t]) * (1 - before) / (1 - bar[t]),
                "vlo_coefficient": vlo_coefficient(beta, t),
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def posterior_variance(beta, t):
    """σ_t² of q(x_{t-1} | x_t, x_0), t counted from 0."""
    bar = alphas_cumprod(beta)
    return beta[t] * (1 - (bar[t - 1] if t > 0 else 1.0)) / (1 - bar[t])


def vlo_coefficient(beta, t):
    """β_t² / (2 σ_t² α_t (1 - ᾱ_t)); the last reverse step, whose σ is 0, borrows a variance."""
    if t > 0:
        variance = posterior_variance(beta, t)
    else:
        variance = posterior_variance(beta, 1) if len(beta) > 1 else beta[0]
    return beta[t] ** 2 / (2 * variance * (1 - beta[t]) * (1 - alphas_cumprod(beta)[t]))


def q_sample(beta, x0, t, noise):
    """x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε, row by row: x0, noise [R, A], t [R]."""
    bar = alphas_cumprod(beta)
    rows = [
        math.sqrt(bar[step]) * x + math.sqrt(1 - bar[step]) * e
        for x, step, e in zip(x0, t, noise, strict=True)
    ]
    return np.array(rows)


def predict_x0(beta, x_t, t, predicted_noise):
    """x_t solved for x_0, then clipped to [-1, 1]."""
    bar = alphas_cumprod(beta)[t]
    x0 = (x_t - math.sqrt(1 - bar) * predicted_noise) / math.sqrt(bar)
    return np.minimum(np.maximum(x0, -1.0), 1.0)


def q_posterior(beta, x0, x_t, t):
    """Mean and standard deviation of q(x_{t-1} | x_t, x_0), by Bayes' rule on two normals.

    p(x_{t-1} | x_0) = N(sqrt(ᾱ_{t-1}) x_0, 1 - ᾱ_{t-1}); p(x_t | x_{t-1}) = N(sqrt(α_t) x_{t-1},
    β_t). Precisions add; at t = 0 the prior is a point at x_0.
    """
    if t == 0:
        return np.array(x0), 0.0
    before, alpha = alphas_cumprod(beta)[t - 1], 1 - beta[t]
    precision = 1 / (1 - before) + alpha / beta[t]
    mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(alpha) * x_t / beta[t]) / precision
    return mean, math.sqrt(1 / precision)


# --- Networks --------------------------------------------------------------------------------


def weights_of(module):
    """A module's parameters and buffers as float64 arrays, by name."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().numpy().astype(np.float64).copy() for name, value in named}


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def layer_norm(x, scale, shift):
    """Minus the mean, over the root of the variance plus 1e-5, then scaled and shifted."""
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-5) * scale + shift


def mlp(weights, prefix, x):
    """A plain MLP of the layers `prefix`.0, `prefix`.1, …: Mish between them, none at the end.

    Where it has norms too, a layer's sums are normalised before Mish.
    """
    indices = sorted(
        int(name.removeprefix(prefix).split(".")[1])
        for name in weights
        if name.startswith(prefix + ".") and name.endswith(".weight")
    )
    for index in indices:
        x = weights[f"{prefix}.{index}.weight"] @ x + weights[f"{prefix}.{index}.bias"]
        if index != indices[-1]:
            norm = f"{prefix.removesuffix('layers')}norms.{index}"
            if f"{norm}.weight" in weights:
                x = layer_norm(x, weights[f"{norm}.weight"], weights[f"{norm}.bias"])
            x = mish(x)
    return x


def sinusoid(t, dim=32):
    """sin(t f_i), then cos(t f_i), with f_i = 10000^(-i / (dim/2 - 1))."""
    frequencies = [10_000 ** (-i / (dim // 2 - 1)) for i in range(dim // 2)]
    return np.array([math.sin(t * f) for f in frequencies] + [math.cos(t * f) for f in frequencies])


def predicted_noise(actor, noisy_action, t, obs):
    """ε_θ for one row: [A], integer, [O] → [A]. The sinusoids are the module's float32 table."""
    time = mlp(actor, "time_mlp", actor["time_table"][t])
    return mlp(actor, "mlp.layers", np.concatenate([noisy_action, time, obs]))


def twin_q(critic, obs, action):
    """Both critics' estimates for one row."""
    x = np.concatenate([obs, action])
    return float(mlp(critic, "q1.layers", x)[0]), float(mlp(critic, "q2.layers", x)[0])


def sample_actions(actor, beta, obs, noise):
    """The whole reverse process, one action at a time: obs [B, O], noise [T, B, N, A]."""
    steps, num_states, num_samples, act_dim = noise.shape
    actions = np.zeros((num_states, num_samples, act_dim))
    for b in range(num_states):
        for n in range(num_samples):
            x = noise[0, b, n]
            for t in range(steps - 1, -1, -1):
                x0 = predict_x0(beta, x, t, predicted_noise(actor, x, t, obs[b]))
                mean, sigma = q_posterior(beta, x0, x, t)
                x = mean + sigma * noise[steps - t, b, n] if t > 0 else mean
            actions[b, n] = np.clip(x, -1, 1)
    return actions


def min_q(critic, obs, actions):
    """The lower twin for every action: [B, O], [B, N, A] → [B, N]."""
    pairs = zip(obs, actions, strict=True)
    return np.array([[min(twin_q(critic, s, a)) for a in row] for s, row in pairs])


def kept_quantiles(critic, obs, action, dropped):
    """Both twins' quantiles for one row, lowest first, without the 2·dropped highest."""
    x = np.concatenate([obs, action])
    pooled = sorted([*mlp(critic, "q1.layers", x), *mlp(critic, "q2.layers", x)])
    return pooled[: len(pooled) - 2 * dropped]


def truncated_q(critic, obs, actions, dropped):
    """The mean of the kept quantiles for every action: [B, O], [B, N, A] → [B, N]."""
    pairs = zip(obs, actions, strict=True)
    return np.array(
        [[np.mean(kept_quantiles(critic, s, a, dropped)) for a in row] for s, row in pairs]
    )


# --- Selection, weights, losses --------------------------------------------------------------


def best_of(q, actions, k=1):
    """The k actions of highest q per state, best first."""
    top_q, top = [], []
    for q_row, action_row in zip(q, actions, strict=True):
        order = np.argsort(-np.array(q_row), kind="stable")[:k]
        top_q.append([q_row[n] for n in order])
        top.append([action_row[n] for n in order])
    return np.array(top_q), np.array(top)


def td_target(reward, terminal, next_q, gamma):
    """The reward alone where the return ends, else with what the next state promises."""
    rows = zip(reward, terminal, next_q, strict=True)
    return np.array([r if ended == 1 else r + gamma * q for r, ended, q in rows])


def n_step_target(steps, start, n, gamma, next_q):
    """γ-discounted rewards of up to n steps of an episode from `start`, and then what is promised.

    Args:
        steps: (reward, terminal) of each step of the episode that is known.
        next_q: of the state after each of them.
    """
    total, discount = 0.0, 1.0
    for t in range(start, min(start + n, len(steps))):
        reward, terminal = steps[t]
        total += discount * reward
        discount *= gamma
        if terminal:
            return total
    return total + discount * next_q[t]


def standardized(history, values):
    """(x - mean) / √(variance + 1e-8) by all of `history` [N, D], clipped at 10: [B, D]."""
    columns = []
    for seen, column in zip(np.array(history, float).T, np.array(values, float).T, strict=True):
        mean = sum(seen) / len(seen)
        variance = sum((x - mean) ** 2 for x in seen) / len(seen)
        columns.append([min(max((x - mean) / math.sqrt(variance + 1e-8), -10), 10) for x in column])
    return np.array(columns).T


def critic_loss(q1, q2, target):
    """mean (Q1 - y)² + mean (Q2 - y)²."""
    first = sum((a - y) ** 2 for a, y in zip(q1, target, strict=True)) / len(target)
    second = sum((a - y) ** 2 for a, y in zip(q2, target, strict=True)) / len(target)
    return first + second


def quantile_loss(quantiles, target):
    """A twin's quantile Huber loss: z [B, n], and the samples y [B, m] of each row's return."""
    total, terms = 0.0, 0
    for z_row, y_row in zip(quantiles, target, strict=True):
        for i, z in enumerate(z_row):
            level = (i + 0.5) / len(z_row)
            for y in y_row:
                error = y - z
                huber = 0.5 * error**2 if abs(error) <= 1 else abs(error) - 0.5
                total += (1 - level if error < 0 else level) * huber
                terms += 1
    return total / terms


def q_weights(kind, chosen_q, value, *, q_cut=1.0, q_mean=0.0, q_std=1.0, temperature=1.0):
    result = np.zeros_like(chosen_q)
    for b, row in enumerate(chosen_q):
        for j, q in enumerate(row):
            if kind == "qadv":
                result[b, j] = q - value[b] if q >= value[b] else 0.0
            elif kind == "qcut":
                result[b, j] = q if q >= 0 else q_cut
            elif kind == "qrelu":
                result[b, j] = q if q > 0 else 0.0
            elif kind == "qexp":
                result[b, j] = math.exp(min(8.0, max(-8.0, (q - q_mean) / q_std)))
            elif kind == "softmax":  # the share of exp(Q/λ)
                result[b, j] = 1 / sum(math.exp((p - q) / temperature) for p in row)
    return result


def soft_weight_kl(weights):
    """ln N minus the entropy of the shares, mean over the states."""
    total = 0.0
    for row in weights:
        total += math.log(len(row)) + sum(w * math.log(w) for w in row if w > 0)
    return total / len(weights)


def entropy_weights(weights, entropy_weight, num_chosen):
    return np.array([entropy_weight * sum(row) / num_chosen for row in weights])


def policy_loss(best, uniform, reduction, num_best):
    """The two terms from lists of (error, weight): `sum` shares one mean, `mean` has one each."""
    best_sum = sum((e * w for e, w in best), 0.0)
    uniform_sum = sum((e * w for e, w in uniform), 0.0)
    if reduction == "sum":
        rows = num_best + len(uniform)
        return best_sum / rows, uniform_sum / rows
    return best_sum / num_best, uniform_sum / len(uniform) if uniform else 0.0


# --- Descent ---------------------------------------------------------------------------------


def gradient_norm(gradients):
    return math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))


def clip_gradients(gradients, limit):
    """Scales all gradients by limit / (norm + 1e-6) where that is below 1."""
    norm = gradient_norm(gradients)
    scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
    return {name: g * scale for name, g in gradients.items()}


@dataclass
class Adam:
    """Kingma & Ba's Adam, β = (0.9, 0.999), epsilon outside of the square root."""

    lr: float
    eps: float
    step: int = 0
    m: dict = field(default_factory=dict)
    v: dict = field(default_factory=dict)

    def descend(self, weights, gradients):
        self.step += 1
        for name, g in gradients.items():
            self.m[name] = 0.9 * self.m.get(name, 0.0) + 0.1 * g
            self.v[name] = 0.999 * self.v.get(name, 0.0) + 0.001 * g**2
            m_hat = self.m[name] / (1 - 0.9**self.step)
            v_hat = self.v[name] / (1 - 0.999**self.step)
            weights[name] = weights[name] - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)


class LearntScale:
    """A positive number: Adam of rate 3e-4 on its logarithm, towards a lower number · excess."""

    def __init__(self, start):
        self.log, self.adam = {"x": math.log(start)}, Adam(3e-4, 1e-8)

    @property
    def value(self):
        return math.exp(self.log["x"])

    def descend(self, excess):
        self.adam.descend(self.log, {"x": self.value * excess})


def moving_average(target, online, tau):
    """θ̄ ← (1 - τ) θ̄ + τ θ."""
    return {name: (1 - tau) * target[name] + tau * online[name] for name in target}


def torch_mlp(weights, prefix, x):
    """`mlp` on rows of a torch tensor, for gradients."""
    names = [n for n in weights if n.startswith(prefix + ".") and n.endswith(".weight")]
    for i, name in enumerate(names):
        x = x @ weights[name].T + weights[name.replace(".weight", ".bias")]
        norm = name.replace(prefix, prefix.removesuffix("layers") + "norms")
        if norm in weights:
            mean = x.mean(dim=1, keepdim=True)
            variance = ((x - mean) ** 2).mean(dim=1, keepdim=True)
            x = (x - mean) / torch.sqrt(variance + 1e-5) * weights[norm]
            x = x + weights[norm.replace(".weight", ".bias")]
        if i < len(names) - 1:
            x = x * torch.tanh(torch.log1p(torch.exp(x)))
    return x


def loss_and_gradients(loss_of, weights):
    """The value of `loss_of(weights)` and its gradients by torch, both float64."""
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in weights.items()}
    loss = loss_of(leaves)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = zip(leaves, gradients, strict=True)
    return loss.item(), {name: g.numpy() for name, g in found if g is not None}


# --- Beyond the paper ------------------------------------------------------------------------


def torch_min_q(critic, obs, actions):
    """The lower twin of every row, with gradients by the actions: both are torch tensors."""
    inputs = torch.cat([obs, actions], dim=1)
    weights = {name: torch.as_tensor(value) for name, value in critic.items()}
    q1, q2 = (torch_mlp(weights, f"{q}.layers", inputs)[:, 0] for q in ("q1", "q2"))
    return torch.minimum(q1, q2)


def improved_actions(critic, obs, action, steps, lr, limit):
    """Adam of eps 1e-5 on the sum of -min Q, its gradient's norm clipped, the box kept: [R, A]."""
    adam, found = Adam(lr, 1e-5), {"action": np.array(action)}
    for _ in range(steps):

        def loss_of(leaves):
            return -sum(torch_min_q(critic, torch.tensor(obs), leaves["action"]))

        _, gradients = loss_and_gradients(loss_of, found)
        adam.descend(found, clip_gradients(gradients, limit))
        found["action"] = np.clip(found["action"], -1, 1)
    return found["action"]


def guided_action(actor, critic, beta, obs, noise, steps, scale):
    """One chain [A] by noise [T, A]; the critics pull its last `steps` steps."""
    bar, last = alphas_cumprod(beta), len(beta) - 1
    state = torch.tensor(obs)[None]
    weights = {name: torch.tensor(value) for name, value in actor.items()}
    x = noise[0]
    for t in range(last, -1, -1):
        predicted = predicted_noise(actor, x, t, obs)
        if t < steps:

            def q_of(leaves, t=t):
                time = torch.tensor(mlp(actor, "time_mlp", actor["time_table"][t]))[None]
                inputs = torch.cat([leaves["x"][None], time, state], dim=1)
                noise_in_x = torch_mlp(weights, "mlp.layers", inputs)
                x0 = (leaves["x"] - math.sqrt(1 - bar[t]) * noise_in_x) / math.sqrt(bar[t])
                return torch_min_q(critic, state, x0.clamp(-1, 1))[0]

            _, gradients = loss_and_gradients(q_of, {"x": x})
            predicted = predicted - scale * math.sqrt(1 - bar[t]) * gradients["x"]
        mean, sigma = q_posterior(beta, predict_x0(beta, x, t, predicted), x, t)
        x = mean + sigma * noise[last + 1 - t] if t > 0 else mean
    return np.clip(x, -1, 1)


def log_density(actor, beta, obs, action, noise):
    """ln p̂ of one action [A] by noise [T, M, A]: MaxEntDP's sum over the steps as printed."""
    bar, act_dim = alphas_cumprod(beta), len(action)
    total = -act_dim / 2 * math.log(2 * math.pi * math.e)
    for t, noises in enumerate(noise):
        before = bar[t - 1] if t > 0 else 1.0
        errors = []
        for e in noises:
            x = math.sqrt(bar[t]) * action + math.sqrt(1 - bar[t]) * e
            x0 = predict_x0(beta, x, t, predicted_noise(actor, x, t, obs))
            found = (x - math.sqrt(bar[t]) * x0) / math.sqrt(1 - bar[t])
            errors.append(sum((found - e) ** 2))
        weight = (before - bar[t]) / (2 * bar[t] * (1 - bar[t]))
        total += weight * (act_dim * bar[t] - sum(errors) / len(errors))
    return total


# --- One whole update ------------------------------------------------------------------------


class Update:
    """What `QVPOLearner.update` should do, for the same networks, hyperparameters and noise."""

    def __init__(self, networks, hp):
        self.hp = hp
        self.beta = betas(hp.noise_schedule, hp.diffusion_steps)
        self.actor, self.critic = weights_of(networks.actor), weights_of(networks.critic)
        self.target_actor = weights_of(networks.target_actor)
        self.target_critic = weights_of(networks.target_critic)
        self.actor_adam = Adam(hp.actor_lr, hp.adam_eps)
        self.critic_adam = Adam(hp.critic_lr, hp.adam_eps)
        self.q_mean, self.q_std = 0.0, 1.0
        self.entropy_weight = 0.01 if hp.entropy_weight == "auto" else hp.entropy_weight
        self.temperature = None
        self.advantage_square = None
        self.alpha = LearntScale(0.05)
        self.number = 0

    def update(self, critic_batch, policy_batch, noise):
        """Arguments are the package's named tuples of float64 tensors. Returns a few metrics."""
        batch = {name: v.numpy() for name, v in critic_batch._asdict().items()}
        noise = {name: v.numpy() for name, v in noise._asdict().items()}
        metrics = {}
        self.number += 1
        policy_is_due = self.number % self.hp.policy_interval == 0
        if self.hp.update_order == "critic_then_policy":
            metrics |= self.update_critic(batch, noise)
        if policy_is_due:
            metrics |= self.update_policy(policy_batch.obs.numpy(), noise)
        if self.hp.update_order == "policy_then_critic":
            metrics |= self.update_critic(batch, noise)
        self.target_actor = moving_average(self.target_actor, self.actor, self.hp.tau)
        self.target_critic = moving_average(self.target_critic, self.critic, self.hp.tau)
        return metrics

    def update_critic(self, batch, noise):
        actor = self.target_actor if self.hp.target_actor else self.actor
        actions = sample_actions(actor, self.beta, batch["next_obs"], noise["target"])
        quantiles = self.hp.critic == "quantile"
        if quantiles:
            q = truncated_q(
                self.target_critic, batch["next_obs"], actions, self.hp.dropped_quantiles
            )
        else:
            q = min_q(self.target_critic, batch["next_obs"], actions)
        price, metrics = np.zeros(len(q)), {}
        if self.hp.entropy_in_target != 0:
            log_p = [
                log_density(actor, self.beta, state, best[0], noise["entropy"][:, b])
                for b, (state, best) in enumerate(
                    zip(batch["next_obs"], best_of(q, actions)[1], strict=True)
                )
            ]
            metrics["policy_entropy"] = -sum(log_p) / len(log_p)
            price = self.entropy_in_target(actions.shape[-1], metrics) * np.array(log_p)
        if quantiles:
            return metrics | self.update_quantiles(batch, actions, q, price)
        next_q = q.max(axis=1) - price
        target = td_target(batch["reward"], batch["terminal"], next_q, self.hp.gamma)
        inputs = torch.tensor(np.concatenate([batch["obs"], batch["action"]], axis=1))

        def loss_of(weights):
            q1, q2 = (torch_mlp(weights, f"{q}.layers", inputs)[:, 0] for q in ("q1", "q2"))
            return critic_loss(q1, q2, target)

        loss, norm = self.descend("critic", self.critic_adam, loss_of)
        metrics |= {"critic_loss": loss, "critic_grad_norm": norm}
        return metrics | {"td_target_mean": target.mean()}

    def entropy_in_target(self, act_dim, metrics):
        """α of this update; a learnt one then takes a step."""
        if self.hp.entropy_in_target != "auto":
            return self.hp.entropy_in_target
        alpha, wanted = self.alpha.value, self.hp.target_entropy
        wanted = -act_dim if wanted is None else wanted
        self.alpha.descend(metrics["policy_entropy"] - wanted)
        return alpha

    def update_quantiles(self, batch, actions, q, price):
        """The same for quantile critics; actions [B, K_t, A] and q [B, K_t] for the next states."""
        dropped, targets = self.hp.dropped_quantiles, []
        for b, obs in enumerate(batch["next_obs"]):
            best = actions[b, np.argmax(q[b])]
            z = np.array(kept_quantiles(self.target_critic, obs, best, dropped)) - price[b]
            reward, terminal = batch["reward"][b], batch["terminal"][b]
            targets.append(td_target([reward] * len(z), [terminal] * len(z), z, self.hp.gamma))
        inputs = torch.tensor(np.concatenate([batch["obs"], batch["action"]], axis=1))

        def loss_of(weights):
            twins = (torch_mlp(weights, f"{name}.layers", inputs) for name in ("q1", "q2"))
            return sum(quantile_loss(z, targets) for z in twins)

        loss, norm = self.descend("critic", self.critic_adam, loss_of)
        spread = np.mean([np.std(y) for y in targets])
        return {
            "critic_loss": loss,
            "critic_grad_norm": norm,
            "td_target_mean": np.mean(targets),
            "td_target_std": spread,
        }

    def update_policy(self, obs, noise):
        hp = self.hp
        samples = sample_actions(self.actor, self.beta, obs, noise["policy"])
        if hp.critic == "quantile":
            q = truncated_q(self.critic, obs, samples, hp.dropped_quantiles)
        else:
            q = min_q(self.critic, obs, samples)
        value = q.mean(axis=1)
        self.q_mean += 1e-3 * (q.mean() - self.q_mean)
        self.q_std += 1e-3 * (q.std() - self.q_std)
        num_chosen = len(q[0]) if hp.q_weights == "softmax" else hp.num_chosen_samples
        chosen_q, chosen = best_of(q, samples, num_chosen)
        if hp.target_refinement != "none":
            chosen = self.refined(obs, samples, q, chosen, noise["policy"])
            chosen_q = min_q(self.critic, obs, chosen)
        scalars = {"q_mean": self.q_mean, "q_std": self.q_std, "q_cut": hp.q_cut}
        if hp.q_weights == "softmax":
            if self.temperature is None:
                spread = np.mean([row.std(ddof=1) for row in q])
                self.temperature = LearntScale(spread / math.sqrt(2 * hp.kl_target))
            scalars["temperature"] = self.temperature.value
        weights = q_weights(hp.q_weights, chosen_q, value, **scalars)
        uniform_weights = entropy_weights(weights, self.entropy_weight, hp.num_chosen_samples)

        # (observation, clean action, weight) of each trained row: all chosen, then all uniform.
        best, flat = [], []
        for b, state in enumerate(obs):
            best += [(state, chosen[b, j], weights[b, j]) for j in range(num_chosen)]
            flat += [(state, action, uniform_weights[b]) for action in noise["uniform"][b]]
        rows = best + flat
        # The package rounds the forward process' constants to float32.
        table = {
            name: np.float32(value).astype(np.float64)
            for name, value in constants(hp.noise_schedule, hp.diffusion_steps).items()
        }
        noisy = [
            table["sqrt_alphas_cumprod"][t] * a + table["sqrt_one_minus_alphas_cumprod"][t] * e
            for (_, a, _), t, e in zip(rows, noise["step"], noise["forward"], strict=True)
        ]
        scale = [table["vlo_coefficient"][t] if hp.vlo_coefficient else 1.0 for t in noise["step"]]
        noisy, true = torch.tensor(np.array(noisy)), torch.tensor(noise["forward"])
        states = torch.tensor(np.array([s for s, _, _ in rows]))

        def loss_of(actor):
            time = torch_mlp(actor, "time_mlp", actor["time_table"][noise["step"]])
            predicted = torch_mlp(actor, "mlp.layers", torch.cat([noisy, time, states], dim=1))
            errors = ((predicted - true) ** 2).mean(dim=1)
            pairs = [(c * e, w) for c, e, (_, _, w) in zip(scale, errors, rows, strict=True)]
            num_best = len(obs) * hp.num_chosen_samples
            terms = pairs[: len(best)], pairs[len(best) :], hp.entropy_reduction, num_best
            return sum(policy_loss(*terms))

        loss, norm = self.descend("actor", self.actor_adam, loss_of, skip="time_table")
        metrics = {"actor_loss": loss, "actor_grad_norm": norm, "q_weight_mean": weights.mean()}
        if hp.q_weights == "softmax":
            metrics["q_weight_kl"] = soft_weight_kl(weights)
            self.temperature.descend(hp.kl_target - metrics["q_weight_kl"])
        if hp.entropy_weight == "auto":
            spread = np.mean([column.std() for rows in samples for column in rows.T])
            self.entropy_weight *= math.exp(3e-3 * (hp.sample_std_target - spread))
        return metrics

    def refined(self, obs, samples, q, chosen, noise):
        hp, (num_states, num_chosen, act_dim) = self.hp, chosen.shape
        if hp.target_refinement == "gradient":
            rows = np.repeat(obs, num_chosen, axis=0)
            moved = improved_actions(
                self.critic,
                rows,
                chosen.reshape(-1, act_dim),
                *(hp.gradient_steps, hp.gradient_lr, 0.1 * act_dim),
            )
            return moved.reshape(chosen.shape)
        square = np.mean((q - q.mean(axis=1)[:, None]) ** 2)
        known = self.advantage_square
        self.advantage_square = square if known is None else known + 1e-3 * (square - known)
        scale = hp.guidance_scale / math.sqrt(self.advantage_square)
        moved = np.zeros_like(chosen)
        for b in range(num_states):
            for j in range(num_chosen):
                own = [np.array_equal(sample, chosen[b, j]) for sample in samples[b]].index(True)
                moved[b, j] = guided_action(
                    *(self.actor, self.critic, self.beta, obs[b], noise[:, b, own]),
                    *(hp.guidance_steps, scale),
                )
        return moved

    def descend(self, name, adam, loss_of, skip=None):
        weights = getattr(self, name)
        loss, gradients = loss_and_gradients(loss_of, weights)
        gradients.pop(skip, None)
        adam.descend(weights, clip_gradients(gradients, self.hp.grad_clip))
        return loss, gradient_norm(gradients)


def in_order(replay):
    """Everything a replay holds, oldest first, in columns of its own."""
    segments = replay.segments()
    return type(segments[0])(*(torch.cat(columns) for columns in zip(*segments, strict=True)))
