"""
What a denoiser returns that learns the data's better actions, judged by the critics of a trained model (one_pass.py).

    python docs/notebook/labs/weighted.py zoo/hopper/mixed-v0 model.zip --temperatures 1 3

Weight of a row: exp((Q(s, a) - mean_z Q(s, f(z, s))) / temperature), at most 100; "inf": all alike.
"""

import argparse
import math
from functools import partial

import numpy as np
import torch as th
from best_of import mean_return, values
from stable_baselines3.common.env_util import make_vec_env

from sb3_consistency import CPQL, make_env, open_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("dataset")
parser.add_argument("file")
parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 3.0, math.inf])
parser.add_argument("--steps", type=int, default=20_000)
args = parser.parse_args()
th.set_num_threads(1)
judge = CPQL.load(args.file)
critic, actor = judge.policy.critic, judge.policy.actor
env = make_vec_env(lambda: make_env(open_dataset(args.dataset).make_env()), n_envs=20)


for temperature in args.temperatures:
    th.manual_seed(0)
    np.random.seed(0)
    model = CPQL.from_dataset(args.dataset, bc_loss="distill", seed=0, device="cpu")
    teacher, dim = model.policy.teacher, model.action_space.shape[0]
    optimizer = th.optim.Adam(teacher.parameters(), 3e-4)
    for step, batch in enumerate(model.batches(args.steps, 256)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-4 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        with th.no_grad():
            obs = batch.observations
            ours = actor.model.denoise(th.randn(1, 4 * len(obs), dim), actor.features(obs).repeat(4, 1))
            advantage = values(critic, obs, batch.actions[None])[0] - values(critic, obs, ours.view(4, len(obs), dim)).mean(0)
            weights = (advantage / temperature).clamp(max=math.log(100)).exp()
        loss = (weights * teacher.bc_loss(teacher.features(obs), batch.actions, None, None)).mean() / weights.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            print(f"advantage: sd {advantage.std():.2f}, quantiles {advantage.quantile(th.tensor([0.05, 0.5, 0.95])).tolist()}")

    def drawn(obs, n, scale, teacher=teacher, dim=dim):
        noise = scale * th.randn(1, n * len(obs), dim)
        return teacher.model.sample(noise, teacher.features(obs).repeat(n, 1)).clamp(-1, 1).view(n, len(obs), dim)

    for name, n, scale in (("T(0)", 1, 0.0), ("T(z)", 1, 1.0), ("best of 8 T(z)", 8, 1.0)):
        score = mean_return(judge, partial(drawn, n=n, scale=scale), env)
        print(f"temperature {temperature:g}, {name}: {score:.0f}", flush=True)
