"""
How precise the models are that CPQL's "distill" could learn from.

    python docs/notebook/labs/teachers.py train zoo/halfcheetah/expert-v0 ConsistencyBC --passes 1 2 5
    python docs/notebook/labs/teachers.py train zoo/halfcheetah/expert-v0 ConsistencyBC --options "{'metric': 'l2'}" --steps 15000
    python docs/notebook/labs/teachers.py euler

"train" clones the data and tells returns, and how far f(a + sigma z, sigma) is from a. "euler" needs no training: the ring of
examples/02_multimodality.py with its exact denoiser, by the levels at which it is asked.
"""

import argparse
from ast import literal_eval

import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

import sb3_consistency
from sb3_consistency import make_env, open_dataset

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 20, 80)
LADDERS = (
    [80, 0.7, 0.35, 0.175],
    [80, 0.8, 0.4, 0.2, 0.1],
    [80, 0.6, 0.2],
    [80, 24.41, 5.84, 0.97, 0.09],
    [12.451, 4.974, 2.304, 1.139, 0.494],
    [80, 2.5],
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
commands = parser.add_subparsers(dest="what", required=True)
train = commands.add_parser("train")
train.add_argument("dataset")
train.add_argument("algo")
train.add_argument("--options", type=literal_eval, default={})
train.add_argument("--steps", type=int, default=30_000)
train.add_argument("--passes", type=int, nargs="+", default=[1])
commands.add_parser("euler")
args = parser.parse_args()
th.set_num_threads(1)


def ring_denoiser(x, sigma, modes, std=0.1):
    variance = std**2 + sigma**2
    weights = -((x[:, None] - modes) ** 2).sum(-1) / 2 / variance
    weights = np.exp(weights - weights.max(1, keepdims=True))
    means = (std**2 * x[:, None] + sigma**2 * modes) / variance
    return (weights[..., None] * means).sum(1) / weights.sum(1, keepdims=True)


if args.what == "euler":
    angles = np.arange(8) * np.pi / 4
    modes = 0.8 * np.stack([np.cos(angles), np.sin(angles)], 1)
    z = np.random.default_rng(0).standard_normal((20_000, 2))
    for levels in LADDERS:
        x = levels[0] * z
        for sigma, lower in zip(levels, [*levels[1:], 0], strict=True):
            clean = ring_denoiser(x, sigma, modes)
            x = clean + lower / sigma * (x - clean)
        distances = np.linalg.norm(x[:, None] - modes, axis=2)
        near = distances.min(1) < 0.3
        kept = (np.bincount(distances.argmin(1)[near], minlength=8) > 0.01 * len(x)).sum()
        print(f"{levels}: {kept} of 8 modes, {100 * near.mean():.1f} % near one")
    raise SystemExit

model = getattr(sb3_consistency, args.algo).from_dataset(args.dataset, compile=True, seed=0, device="cpu", **args.options)
model.pretrain(args.steps)
env = make_vec_env(lambda: make_env(open_dataset(args.dataset).make_env()), n_envs=20)
for passes in args.passes:
    model.sampling_steps = passes
    for deterministic in (True, False):
        env.seed(1000)
        returns, _ = evaluate_policy(model, env, 20, deterministic=deterministic, return_episode_rewards=True)
        how = "deterministic" if deterministic else "sampled"
        print(f"{args.algo} {args.options}, {passes} passes, {how}: {np.mean(returns):.0f}, sd {np.std(returns):.0f}", flush=True)
if args.algo == "ConsistencyBC":
    th.manual_seed(0)
    np.random.seed(0)
    batch, actor = next(model.batches(1, 4096)), model.policy.actor
    with th.no_grad():
        features, actions = actor.features(batch.observations), batch.actions
        for sigma in SIGMAS:
            noisy = actions + sigma * th.randn_like(actions)
            clean = actor.model(noisy, th.full((1,), float(sigma)), features).clamp(-1, 1)
            print(f"sigma {sigma}: {(clean - actions).square().mean().sqrt():.3f} from the data")
