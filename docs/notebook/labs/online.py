"""
A small, fast lab for online actor-critics whose policy takes one pass: SAC's frame, several policies, several critics.

    python lab.py --arm "B+utd=2+delay=2" --env HalfCheetah-v5 --steps 30000 --seed 0

An arm is a base of BASES and changes of fields of ``Config``, joined by "+". A finished run appends one line of JSON.
All policies share one form: an action, and a cost c (log-probability, or transport cost); a temperature w:
    actor:        L = mean(w c - Q(s, a))
    target:       y = r + gamma (1 - done) (Q'(s', a') - w c')
    temperature:  log w <- log w + lr (c - budget)
SAC is c = log p and budget = dim (its target entropy is -budget).
"""

import argparse
import copy
import dataclasses
import fcntl
import json
import math
import os
import time

import gymnasium as gym
import numpy as np
import torch as th
from torch import nn
from torch.nn import functional as F

HERE = os.path.dirname(os.path.abspath(__file__))


@dataclasses.dataclass(frozen=True)
class Config:
    policy: str = "gauss"  # gauss, head (K = 1) and mix (K > 1), transport, pair, greedy
    width: int = 256
    depth: int = 2
    actor_width: int = 0  # 0: as width
    actor_depth: int = 0
    act: str = "relu"
    actor_act: str = ""
    ln: int = 1  # 1: LayerNorm in the critics, 2: without scale and shift, 0: none
    actor_ln: int = 0
    late: int = 0  # z enters before the last hidden layer's activation only
    z_scale: float = 1.0  # factor of z at the network's input
    z_init: float = -1.0  # factor of the initial weights of z; -1: 1
    v_init: float = 1.0  # factor of the initial weights of the output layer
    z_clip: float = 1.0  # transport only
    K: int = 1  # components of the mixture's log-probability
    lr: float = 3e-4
    lr_critic: float = 0.0  # 0: lr
    lr_ent: float = 0.0  # 0: lr
    ent0: float = 1.0
    ent_fixed: int = 0
    budget: float = 1.0  # per action dimension
    spread: int = 0  # transport only: the temperature aims at an entropy of -budget, by distances of pairs; 2: before tanh
    starts: int = 1000
    batch: int = 256
    utd: int = 1
    delay: int = 1  # critic updates per actor update
    n_critics: int = 2
    pair: int = 0  # the minimum over a random pair, of more critics
    rand_q: int = 0  # the actor climbs one critic, drawn at every update
    mean_q: int = 0  # the actor climbs the mean instead of the minimum
    quantiles: int = 1
    drop: int = 2  # quantiles dropped per critic
    n_step: int = 1
    gamma: float = 0.99
    tau: float = 0.005
    b2: float = 0.999
    noise: float = 0.1  # greedy only


BASES = {
    "SAC": dict(ln=0, starts=100),
    "C": dict(),
    "A": dict(policy="head"),
    "D": dict(policy="head", K=8, late=1),
    "B": dict(policy="transport", budget=0.5, lr_ent=3e-5),
    "E": dict(policy="pair", K=2),
    "F": dict(policy="transport", spread=1),
    "G": dict(policy="greedy", delay=2),
}


def parse(arm: str) -> Config:
    base, *changes = arm.split("+")
    values = dict(BASES[base])
    types = {f.name: type(f.default) for f in dataclasses.fields(Config)}
    for change in changes:
        key, value = change.split("=")
        values[key] = types[key](value)
    return Config(**values)


# ---------------------------------------------------------------------------------------------------- losses


def tanh_log_det(u: th.Tensor) -> th.Tensor:
    """log |d tanh(u) / du|, summed over action dimensions: (..., A) -> (...,)."""
    return (2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


def gaussian_log_prob(eps: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """log N(mean + std eps; mean, std), summed over the last dimension."""
    return (-0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def mixture_log_prob(u: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """log of the mean of K Gaussians' densities: (B, A), (K, B, A), (K, B, A) -> (B,)."""
    return gaussian_log_prob((u - mean) * (-log_std).exp(), log_std).logsumexp(0) - math.log(mean.shape[0])


def transport_cost(v: th.Tensor) -> th.Tensor:
    """|v|^2 / 2 summed over action dimensions."""
    return 0.5 * v.square().sum(-1)


# what the mean log distance of two Gaussian numbers lacks to their entropy
PAIRS_TO_ENTROPY = 0.5 * math.log(2 * math.pi * math.e) - 0.5 * math.log(2) + 0.5 * (0.5772156649 + math.log(2))


def log_distance(u: th.Tensor, other: th.Tensor) -> th.Tensor:
    """
    log |tanh(u) - tanh(other)|, summed over the last dimension, plus what makes its mean the entropy if both are Gaussian:
    tanh u - tanh u' = sinh(u - u') / (cosh u cosh u'); E log |e - e'| = log(std) + log(sqrt 2) - (gamma + log 2) / 2.
    """
    distance = ((u - other).square() + 1e-6).sqrt()
    log_sinh = distance + th.log1p(-(-2 * distance).exp())
    log_cosh = u.abs() + other.abs() + F.softplus(-2 * u.abs()) + F.softplus(-2 * other.abs())
    return (log_sinh - log_cosh + math.log(2) + PAIRS_TO_ENTROPY).sum(-1)


def actor_loss(q: th.Tensor, cost: th.Tensor, weight: th.Tensor) -> th.Tensor:
    return (weight * cost - q).mean()


def soft_target(reward, done, discount, next_q, next_cost, weight):
    return reward + discount * (1 - done) * (next_q - weight * next_cost)


def weight_loss(log_weight: th.Tensor, cost: th.Tensor, budget: float) -> th.Tensor:
    return -(log_weight * (cost.detach() - budget)).mean()


def twin_loss(q: th.Tensor, target: th.Tensor) -> th.Tensor:
    """q (n, B), target (B,)."""
    return 0.5 * (q - target).square().mean(1).sum()


def quantile_loss(q: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    A loss with the quantile Huber loss's gradient, cheap on CPUs. q (n, B, M), target (B, T).
    """
    m = q.shape[-1]
    with th.no_grad():
        tau = (th.arange(m) + 0.5) / m
        delta = target[None, :, None, :] - q[..., None]  # (n, B, M, T)
        below = (delta < 0).float()
        slope = delta.clamp_(-1, 1).mul_((tau[:, None] - below).abs_()).mean(-1)
    return -(q * slope).sum(-1).mean(1).sum()


# ---------------------------------------------------------------------------------------------------- networks

ACTS = {"relu": F.relu, "silu": F.silu, "mish": F.mish, "elu": F.elu, "tanh": th.tanh}


class StackedLinear(nn.Module):
    def __init__(self, n: int, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(th.empty(n, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(th.empty(n, 1, n_out).uniform_(-bound, bound))

    def forward(self, x):
        if self.weight.shape[-1] == 1:
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        return th.baddbmm(self.bias, x.expand(self.weight.shape[0], -1, -1), self.weight)


class StackedLayerNorm(nn.Module):
    def __init__(self, n: int, width: int, affine: bool) -> None:
        super().__init__()
        self.affine = affine
        if affine:
            self.weight = nn.Parameter(th.ones(n, 1, width))
            self.bias = nn.Parameter(th.zeros(n, 1, width))

    def forward(self, x):
        x = F.layer_norm(x, x.shape[-1:])
        return th.addcmul(self.bias, x, self.weight) if self.affine else x


class Act(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.function = ACTS[name]

    def forward(self, x):
        return self.function(x)


class Critic(nn.Module):
    """n critics of M outputs each: (B, S), (B, A) -> (n, B, M)."""

    def __init__(self, n_in: int, cfg: Config) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(cfg.depth):
            layers.append(StackedLinear(cfg.n_critics, n_in, cfg.width))
            if cfg.ln:
                layers.append(StackedLayerNorm(cfg.n_critics, cfg.width, cfg.ln == 1))
            layers.append(Act(cfg.act))
            n_in = cfg.width
        layers.append(StackedLinear(cfg.n_critics, n_in, cfg.quantiles))
        self.layers = nn.Sequential(*layers)

    def forward(self, obs, action):
        return self.layers(th.cat([obs, action], -1))


class Actor(nn.Module):
    """
    (B, S), z (K, B, A) or None, eps (B, A) -> action (B, A), cost (B,).
    """

    def __init__(self, n_obs: int, n_act: int, cfg: Config) -> None:
        super().__init__()
        self.cfg, self.n_act = cfg, n_act
        width, depth = cfg.actor_width or cfg.width, cfg.actor_depth or cfg.depth
        self.has_z = cfg.policy in ("head", "transport", "pair")
        self.n_out = n_act * (2 if cfg.policy in ("gauss", "head") else 1)
        early = self.has_z and not cfg.late
        sizes = [n_obs + n_act * early] + [width] * depth
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=cfg.actor_ln == 1) for _ in range(depth)) if cfg.actor_ln else None
        self.out = nn.Linear(width, self.n_out)
        self.act = ACTS[cfg.actor_act or cfg.act]
        if self.has_z and cfg.late:
            self.z_in = nn.Linear(n_act, width, bias=False)
        with th.no_grad():
            if cfg.z_init >= 0 and self.has_z:
                if cfg.late:
                    self.z_in.weight.mul_(cfg.z_init)
                else:
                    self.hidden[0].weight[:, n_obs:].mul_(cfg.z_init)
            self.out.weight.mul_(cfg.v_init)
            self.out.bias.mul_(cfg.v_init)

    def gaussian(self, raw):
        """mean, log_std of the head, each of the shape (K, B, A)."""
        mean, log_std = raw.chunk(2, -1)
        return mean, log_std.clamp(-20 if self.cfg.policy == "gauss" else -5, 2)

    def raw(self, obs, z):
        """obs (B, S), z (K, B, A) -> (K, B, n_out); without z, K = 1."""
        cfg = self.cfg
        if self.has_z and not cfg.late:
            zz = z if cfg.z_scale == 1 else z * cfg.z_scale
            x = th.cat([obs.expand(z.shape[0], -1, -1), zz], -1)
        else:
            x = obs[None]
        last = len(self.hidden) - 1
        for i, layer in enumerate(self.hidden):
            x = layer(x)
            if self.norms is not None:
                x = self.norms[i](x)
            if i == last and self.has_z and cfg.late:
                x = x + self.z_in(z if cfg.z_scale == 1 else z * cfg.z_scale)
            x = self.act(x)
        return self.out(x)

    def noise(self, n: int, k: int | None = None):
        k = self.cfg.K if k is None else k
        z = th.randn(k, n, self.n_act) if self.has_z else None
        if self.cfg.policy in ("transport", "pair") and self.cfg.z_clip:
            z.clamp_(-self.cfg.z_clip, self.cfg.z_clip)
        return z, (th.randn(n, self.n_act) if self.cfg.policy not in ("transport", "pair") else None)

    def forward(self, obs, z, eps):
        cfg = self.cfg
        if cfg.policy == "pair":
            u = z[0] + self.raw(obs, z[:1])[0]
            with th.no_grad():
                other = z[1] + self.raw(obs, z[1:])[0]
            spread = log_distance(u, other)
            # the other's gradient is of the same mean: it is counted here
            return th.tanh(u), -(2 * spread - spread.detach())
        raw = self.raw(obs, z)
        if cfg.policy == "transport":
            v = raw[0]
            return th.tanh(z[0] + v), transport_cost(v)
        if cfg.policy == "greedy":
            a = th.tanh(raw[0])
            return (a + cfg.noise * eps).clamp(-1, 1), a.new_zeros(a.shape[0])
        mean, log_std = self.gaussian(raw)
        u = mean[0] + log_std[0].exp() * eps
        if mean.shape[0] == 1:
            log_prob = gaussian_log_prob(eps, log_std[0])
        else:
            log_prob = mixture_log_prob(u, mean, log_std)
        return th.tanh(u), log_prob - tanh_log_det(u)

    def act_on(self, obs, z=None, eps=None):
        """Actions (B, A); z and eps 0 where None."""
        zero = obs.new_zeros(obs.shape[0], self.n_act)
        z = zero[None] if z is None and self.has_z else z
        raw = self.raw(obs, z)[0]
        if self.cfg.policy in ("transport", "pair"):
            return th.tanh(z[0] + raw)
        if self.cfg.policy == "greedy":
            return th.tanh(raw) if eps is None else (th.tanh(raw) + self.cfg.noise * eps).clamp(-1, 1)
        mean, log_std = self.gaussian(raw)
        return th.tanh(mean if eps is None else mean + log_std.exp() * eps)


# ---------------------------------------------------------------------------------------------------- replay


class Replay:
    """Rows [obs, action, next_obs, reward, done, end] in one tensor; one index_select is a batch."""

    def __init__(self, size: int, n_obs: int, n_act: int, n_step: int, gamma: float) -> None:
        self.rows = np.zeros((size, 2 * n_obs + n_act + 3), np.float32)
        self.tensor = th.from_numpy(self.rows)
        self.splits = [n_obs, n_act, n_obs, 1, 1, 1]
        self.n_obs, self.n_act, self.n_step, self.gamma = n_obs, n_act, n_step, gamma
        self.pos = 0

    def add(self, obs, action, next_obs, reward, done, end):
        row, n, m = self.rows[self.pos], self.n_obs, self.n_act
        row[:n], row[n : n + m], row[n + m : 2 * n + m] = obs, action, next_obs
        row[-3:] = reward, done, end
        self.pos += 1

    def sample(self, batch: int):
        i = th.randint(self.pos, (batch,))
        obs, action, next_obs, reward, done, end = self.tensor.index_select(0, i).split(self.splits, 1)
        reward, done = reward[:, 0], done[:, 0]
        if self.n_step == 1:
            return obs, action, next_obs, reward, done, self.gamma
        reward, alive, last = reward.clone(), 1 - end[:, 0], i.clone()
        discount = th.full_like(reward, self.gamma)
        for _ in range(1, self.n_step):
            nxt = last + 1
            alive = alive * (nxt < self.pos)
            nxt.clamp_(max=self.pos - 1)
            r = self.tensor[nxt, -3]
            reward += alive * discount * r
            discount = th.where(alive > 0, discount * self.gamma, discount)
            last = th.where(alive > 0, nxt, last)
            alive = alive * (1 - self.tensor[nxt, -1])
        final = self.tensor.index_select(0, last)
        return obs, action, final[:, self.n_obs + self.n_act : -3], reward, final[:, -2], discount


# ---------------------------------------------------------------------------------------------------- agent


class FastAdam:
    """torch.optim.Adam(fused=True) without its 0.3 ms of Python per step."""

    def __init__(self, params: list[th.Tensor], lr: float, b2: float = 0.999) -> None:
        self.params, self.lr, self.b2 = params, lr, b2
        self.m, self.v = [th.zeros_like(p) for p in params], [th.zeros_like(p) for p in params]
        self.steps = [th.zeros(()) for _ in params]

    @th.no_grad()
    def step(self) -> None:
        th._foreach_add_(self.steps, 1)
        th._fused_adam_(
            self.params, [p.grad for p in self.params], self.m, self.v, [], self.steps, lr=self.lr, beta1=0.9,
            beta2=self.b2, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )
        for p in self.params:
            p.grad = None


class Agent:
    def __init__(self, n_obs: int, n_act: int, cfg: Config) -> None:
        self.cfg, self.n_act = cfg, n_act
        self.actor = Actor(n_obs, n_act, cfg)
        self.critic = Critic(n_obs + n_act, cfg)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_weight = th.tensor(math.log(cfg.ent0) if cfg.ent0 > 0 else -math.inf, requires_grad=True)
        self.budget = cfg.budget * n_act
        self.actor_params, self.critic_params = list(self.actor.parameters()), list(self.critic.parameters())
        self.target_params = list(self.target.parameters())
        self.actor_opt = FastAdam(self.actor_params, cfg.lr, cfg.b2)
        self.critic_opt = FastAdam(self.critic_params, cfg.lr_critic or cfg.lr, cfg.b2)
        self.weight_opt = FastAdam([self.log_weight], cfg.lr_ent or cfg.lr)
        self.learn_weight = not cfg.ent_fixed and cfg.policy != "greedy"
        self.updates = 0
        self.last: dict[str, th.Tensor] = {}

    def value(self, q: th.Tensor, pair: th.Tensor | None = None) -> th.Tensor:
        """Critics' outputs (n, B, M) -> one value (B,)."""
        if self.cfg.quantiles > 1:
            return q.mean((0, 2))
        q = q[..., 0]
        return q.amin(0) if pair is None else q.index_select(0, pair).amin(0)

    def update(self, replay: Replay) -> None:
        cfg = self.cfg
        self.updates += 1
        obs, action, next_obs, reward, done, discount = replay.sample(cfg.batch)
        weight = self.log_weight.detach().exp() if cfg.policy != "greedy" else th.zeros(())
        with th.no_grad():
            next_action, next_cost = self.actor(next_obs, *self.actor.noise(cfg.batch))
            q = self.target(next_obs, next_action)
            if cfg.quantiles > 1:
                q = q.permute(1, 0, 2).flatten(1).sort(-1).values[:, : cfg.n_critics * (cfg.quantiles - cfg.drop)]
                target = soft_target(*(x[:, None] if isinstance(x, th.Tensor) else x for x in (reward, done, discount)), q, next_cost[:, None], weight)
            else:
                pair = th.randperm(cfg.n_critics)[:2] if cfg.pair else None
                target = soft_target(reward, done, discount, self.value(q, pair), next_cost, weight)
        q = self.critic(obs, action)
        loss = quantile_loss(q, target) if cfg.quantiles > 1 else twin_loss(q[..., 0], target)
        loss.backward()
        self.critic_opt.step()
        if self.updates % cfg.delay == 0:
            pi, cost = self.actor(obs, *self.actor.noise(cfg.batch))
            q = self.critic(obs, pi)
            if cfg.rand_q:
                q = q[th.randint(cfg.n_critics, (1,))]
            value = q[..., 0].mean(0) if cfg.mean_q and cfg.quantiles == 1 else self.value(q, pair if cfg.quantiles == 1 else None)
            actor_loss(value, cost, weight).backward(inputs=self.actor_params)
            self.actor_opt.step()
            if self.learn_weight:
                if cfg.spread:
                    with th.no_grad():
                        other, mine = self.actor(obs, *self.actor.noise(cfg.batch))[0], pi
                        if cfg.spread == 2:
                            other, mine = (x.clamp(-1 + 1e-6, 1 - 1e-6).atanh() for x in (other, mine))
                        told = -(0.5 * ((mine - other).square() + 1e-6).log() + PAIRS_TO_ENTROPY).sum(-1)
                else:
                    told = cost
                weight_loss(self.log_weight, told, self.budget).backward()
                self.weight_opt.step()
                cost = told
            self.last = {"q": value.detach(), "cost": cost.detach()}
        th._foreach_lerp_(self.target_params, self.critic_params, cfg.tau)

    @th.no_grad()
    def explore(self, obs: np.ndarray) -> np.ndarray:
        z, eps = self.actor.noise(1, 1)
        return self.actor.act_on(th.from_numpy(obs)[None], z, eps)[0].numpy()

    @th.no_grad()
    def deterministic(self, obs: np.ndarray) -> np.ndarray:
        return self.actor.act_on(th.from_numpy(obs)).numpy()

    @th.no_grad()
    def sampled(self, obs: np.ndarray) -> np.ndarray:
        return self.actor.act_on(th.from_numpy(obs), *self.actor.noise(len(obs), 1)).numpy()

    @th.no_grad()
    def best_of(self, obs: np.ndarray, n: int = 8) -> np.ndarray:
        o = th.from_numpy(obs).repeat_interleave(n, 0)
        a = self.actor.act_on(o, *self.actor.noise(len(o), 1))
        q = self.value(self.critic(o, a)).view(-1, n)
        return a.view(len(obs), n, -1)[th.arange(len(obs)), q.argmax(1)].numpy()

    @th.no_grad()
    def diagnostics(self, replay: Replay, n: int = 16) -> dict[str, float]:
        obs = replay.sample(128)[0]
        o = obs.repeat_interleave(n, 0)
        z, eps = self.actor.noise(len(o), 1)
        both = self.actor.act_on(o, z, eps).view(128, n, -1).std(1).mean().item()
        only_z = self.actor.act_on(o, z, None).view(128, n, -1).std(1).mean().item() if self.actor.has_z else 0.0
        return {
            "std": round(both, 4), "std_z": round(only_z, 4), "w": round(self.log_weight.exp().item(), 5),
            "q": round(self.last["q"].mean().item(), 2), "cost": round(self.last["cost"].mean().item(), 3),
        }


# ---------------------------------------------------------------------------------------------------- runs


def evaluate(act, env_id: str, seed: int, episodes: int) -> float:
    """Mean return of episodes played side by side (one network call for all)."""
    envs = [gym.make(env_id) for _ in range(episodes)]
    low, high = envs[0].action_space.low, envs[0].action_space.high
    obs = [env.reset(seed=100_000 + 1000 * seed + i)[0].astype(np.float32) for i, env in enumerate(envs)]
    returns, alive = [0.0] * episodes, list(range(episodes))
    while alive:
        actions = act(np.stack([obs[i] for i in alive]))
        actions = low + (np.clip(actions, -1, 1) + 1) * 0.5 * (high - low)
        for i, action in zip(list(alive), actions):
            o, r, term, trunc, _ = envs[i].step(action)
            obs[i] = o.astype(np.float32)
            returns[i] += r
            if term or trunc:
                alive.remove(i)
    for env in envs:
        env.close()
    return sum(returns) / episodes


def train(arm: str, env_id: str, steps: int, seed: int, every: int, episodes: int, after=None) -> dict:
    cfg = parse(arm)
    th.manual_seed(seed)
    np.random.seed(seed)
    env = gym.make(env_id)
    env.action_space.seed(seed)
    low, high = env.action_space.low, env.action_space.high
    n_obs, n_act = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(n_obs, n_act, cfg)
    replay = Replay(steps, n_obs, n_act, cfg.n_step, cfg.gamma)
    obs = env.reset(seed=seed)[0].astype(np.float32)
    curve, diags, busy = [], [], 0.0
    start, at_starts = time.process_time(), 0.0
    for step in range(1, steps + 1):
        if step <= cfg.starts:
            action = np.random.uniform(-1, 1, n_act).astype(np.float32)
        else:
            action = agent.explore(obs)
        next_obs, reward, term, trunc, _ = env.step(low + (action + 1) * 0.5 * (high - low))
        next_obs = next_obs.astype(np.float32)
        replay.add(obs, action, next_obs, reward, term, term or trunc)
        obs = env.reset()[0].astype(np.float32) if term or trunc else next_obs
        if step == cfg.starts:
            at_starts = time.process_time() - start - busy
        if step > cfg.starts:
            for _ in range(cfg.utd):
                agent.update(replay)
        if step % 1000 == 0 or step % every == 0:
            t = time.process_time()
            if step % 1000 == 0 and agent.last:
                diags.append({"step": step, **agent.diagnostics(replay)})
            if step % every == 0:
                curve.append(round(evaluate(agent.deterministic, env_id, seed, episodes), 1))
                print(arm, env_id, seed, step, curve[-1], diags[-1:], flush=True)
            busy += time.process_time() - t
    cpu = time.process_time() - start - busy
    if after is not None:
        return after(agent)
    return {
        "curve": curve, "cpu_s": round(cpu, 1), "ms": round(1000 * (cpu - at_starts) / max(steps - cfg.starts, 1), 2),
        "eval_s": round(busy, 1), "sampled": round(evaluate(agent.sampled, env_id, seed, episodes), 1),
        "best_of_8": round(evaluate(agent.best_of, env_id, seed, episodes), 1), "diag": diags,
    }


def train_sb3(arm: str, env_id: str, steps: int, seed: int, every: int, episodes: int) -> dict:
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback

    name = arm.split("_")[1].upper()
    curve = []

    class Evaluate(BaseCallback):
        busy = 0.0

        def _on_step(self):
            if self.num_timesteps % every == 0:
                t = time.process_time()
                act = lambda o: model.policy.scale_action(model.predict(o, deterministic=True)[0])
                curve.append(round(evaluate(act, env_id, seed, episodes), 1))
                print(arm, env_id, seed, self.num_timesteps, curve[-1], flush=True)
                self.busy += time.process_time() - t
            return True

    model = getattr(sb3_contrib if name == "TQC" else stable_baselines3, name)("MlpPolicy", env_id, seed=seed, device="cpu", verbose=0)
    callback = Evaluate()
    start = time.process_time()
    model.learn(steps, callback=callback)
    cpu = time.process_time() - start - callback.busy
    return {"curve": curve, "cpu_s": round(cpu, 1), "ms": round(1000 * cpu / steps, 2), "eval_s": round(callback.busy, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arm", required=True)
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=2500)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--out", default=os.path.join(HERE, "results.jsonl"))
    args = parser.parse_args()
    th.set_num_threads(1)
    key = {"arm": args.arm, "env": args.env, "steps": args.steps, "seed": args.seed}
    if os.path.exists(args.out) and any({k: r.get(k) for k in key} == key for r in map(json.loads, open(args.out))):
        return
    run = train_sb3 if args.arm.startswith("sb3_") else train
    record = {**key, "every": args.every, **run(args.arm, args.env, args.steps, args.seed, args.every, args.episodes)}
    record["when"] = time.strftime("%H:%M")
    with open(args.out, "a") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
