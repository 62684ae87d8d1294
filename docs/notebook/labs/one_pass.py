"""
Where the deterministic actions of CPQL's "distill" should come from. One training run, of which teacher and critics are kept:

    python docs/notebook/labs/one_pass.py pretrain zoo/hopper/mixed-v0 model.zip --options "{'alpha': 3.0}"
    python docs/notebook/labs/one_pass.py acting zoo/hopper/mixed-v0 model.zip
    python docs/notebook/labs/one_pass.py fit zoo/hopper/mixed-v0 model.zip
    python docs/notebook/labs/one_pass.py heads zoo/hopper/mixed-v0 model.zip --arms rho=1 rho=1,margin=0.01 rho=0.5

"acting" judges ways to act by the networks as they are. "fit" tells how far teacher and actor are from the data, and their values. "heads" trains a network of its own per arm to imitate the best of n actions of
the teacher with noise rho, the first without noise and kept unless another is better by the margin (in units of the mean of |Q|).
"""

import argparse
from ast import literal_eval

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import nn

from sb3_consistency import CPQL, make_env, open_dataset
from sb3_consistency.values.losses import choose_candidate, pessimistic_value

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("what", choices=["pretrain", "acting", "fit", "heads"])
parser.add_argument("dataset")
parser.add_argument("model")
parser.add_argument("--options", type=literal_eval, default={}, help="arguments of CPQL, as a dict")
parser.add_argument("--steps", type=int, help="50,000 of pretrain, 5,000 of heads")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--arms", nargs="+", default=["rho=1"])
args = parser.parse_args()
th.set_num_threads(1)

if args.what == "pretrain":
    options = {"bc_loss": "distill", "compile": True, "precision": "bf16", "seed": args.seed, "device": "cpu", **args.options}
    CPQL.from_dataset(args.dataset, **options).pretrain(args.steps or 50_000).save(args.model)
    raise SystemExit

source = open_dataset(args.dataset)
env = make_vec_env(lambda: make_env(source.make_env()), n_envs=20)
model = CPQL.load(args.model)
actor, teacher, critic = model.policy.actor, model.policy.teacher, model.policy.critic
dim = model.action_space.shape[0]


class Acting:
    """A policy for evaluate_policy: scaled actions (B, A) from observations (B, O)."""

    def __init__(self, choose):
        self.choose = choose

    def predict(self, obs, state=None, episode_start=None, deterministic=True):
        with th.no_grad():
            actions = self.choose(th.as_tensor(obs, dtype=th.float32)).clamp(-1, 1).numpy()
        return model.policy.unscale_action(actions), state


def judge(name, choose):
    env.seed(1000)
    returns, lengths = evaluate_policy(Acting(choose), env, 20, return_episode_rewards=True)
    print(f"{args.model} {name}: {np.mean(returns):.0f}, sd {np.std(returns):.0f}, length {np.mean(lengths):.0f}", flush=True)


def drawn(network, obs, n, noise, first_still=False):
    """n actions of each row, (n, B, A)."""
    z = noise * th.randn(1, n * len(obs), dim)
    if first_still:
        z[:, : len(obs)] = 0
    return network.model.sample(z, network.features(obs).repeat(n, 1)).view(n, len(obs), dim)


def best(obs, actions, margin=0.0):
    n = len(actions)
    values = pessimistic_value(critic.q_networks(critic.features(obs).repeat(n, 1), actions.reshape(-1, dim))).view(n, -1)
    values[0] += margin * values.abs().mean()
    return choose_candidate(values.T, actions.transpose(0, 1))


if args.what == "acting":
    th.manual_seed(args.seed)
    constant = [th.randn(1, 1, dim) for _ in range(4)]
    judge("f(0)", lambda obs: drawn(actor, obs, 1, 0.0)[0])
    judge("f(z)", lambda obs: drawn(actor, obs, 1, 1.0)[0])
    judge("f(z/2)", lambda obs: drawn(actor, obs, 1, 0.5)[0])
    for i, z in enumerate(constant):
        judge(f"f, constant z {i}", lambda obs, z=z: actor.model.sample(z.expand(1, len(obs), dim), actor.features(obs)))
    judge("mean of 16 f(z)", lambda obs: drawn(actor, obs, 16, 1.0).clamp(-1, 1).mean(0))
    judge("best of 8 f(z)", lambda obs: best(obs, drawn(actor, obs, 8, 1.0)))
    judge("best of 8 f(z/2)", lambda obs: best(obs, drawn(actor, obs, 8, 0.5)))
    judge("T(0)", lambda obs: drawn(teacher, obs, 1, 0.0)[0])
    judge("T(z)", lambda obs: drawn(teacher, obs, 1, 1.0)[0])
    judge("best of 8 T(z)", lambda obs: best(obs, drawn(teacher, obs, 8, 1.0)))
    raise SystemExit

model.load_dataset(args.dataset)

if args.what == "fit":
    th.manual_seed(args.seed)
    np.random.seed(args.seed)
    batch = next(model.batches(1, 4096))
    obs, data = batch.observations, batch.actions
    z = th.randn(1, *data.shape)
    with th.no_grad():
        mine, taught = (net.model.sample(z, net.features(obs)).clamp(-1, 1) for net in (actor, teacher))
        for name, a, b in (("T(z), data", taught, data), ("f(z), data", mine, data), ("f(z), T(z)", mine, taught)):
            print(f"{args.model} {name}: {(a - b).square().mean().sqrt():.3f} apart")
        values = th.stack([pessimistic_value(critic(obs, drawn(teacher, obs, 1, 1.0)[0])) for _ in range(8)])
        print(f"{args.model} value of T(z): {values.mean():.1f}, sd over z {values.std(0).mean():.2f}")
    raise SystemExit

for arm in args.arms:
    told = {"n": 8, "rho": 1.0, "margin": 0.0, **{k: float(v) for k, v in (x.split("=") for x in arm.split(","))}}
    th.manual_seed(args.seed)
    n_in, steps = teacher.features(next(model.batches(1, 1)).observations).shape[1], args.steps or 5_000
    head = nn.Sequential(nn.Linear(n_in, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, dim), nn.Tanh())
    optimizer = th.optim.Adam(head.parameters(), 1e-3)
    rate = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in model.batches(steps, 256):
        obs = batch.observations
        with th.no_grad():
            target = best(obs, drawn(teacher, obs, int(told["n"]), told["rho"], first_still=True), told["margin"])
            features = teacher.features(obs)
        optimizer.zero_grad()
        (head(features) - target).square().mean().backward()
        optimizer.step()
        rate.step()
    judge(arm, lambda obs, head=head: head(teacher.features(obs)))
