"""
Deterministic returns, offline, of the actor itself, of its moving average and of the average of its last tenth.

    python docs/notebook/labs/offline_average.py zoo/hopper/expert-v0 0
"""

import argparse
import copy

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_consistency import CPQL, make_env, open_dataset
from sb3_consistency.algorithms.actor_critic import last_tenth_share

OPTIONS = {"bc_loss": "distill", "alpha": 3.0, "n_steps": 5, "gamma": 0.997, "compile": True, "precision": "bf16"}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data")
parser.add_argument("seed", type=int)
parser.add_argument("--steps", type=int, default=50_000)
parser.add_argument("--every", type=int, default=5_000)
parser.add_argument("--episodes", type=int, default=10)
args = parser.parse_args()
th.set_num_threads(1)


class Averages(BaseCallback):
    """Keeps the average, and evaluates all three."""

    def _on_training_start(self):
        self.average = copy.deepcopy(self.model.policy.actor)
        source = open_dataset(args.data)
        self.env = make_vec_env(lambda: make_env(source.make_env()), n_envs=args.episodes, seed=args.seed)

    def _on_step(self):
        n, policy = self.n_calls, self.model.policy
        own = [*policy.actor.parameters()]
        with th.no_grad():
            th._foreach_lerp_([*self.average.parameters()], own, last_tenth_share(n))
        if n % args.every == 0:
            actor, told = policy.actor, [n]
            for network in (actor, policy.actor_target, self.average):
                policy.actor = network
                returns, lengths = evaluate_policy(self.model, self.env, args.episodes, return_episode_rewards=True)
                told += [f"{np.mean(returns):.0f} (least {min(returns):.0f}, {np.mean(lengths):.0f} steps)"]
            policy.actor = actor
            print("| " + " | ".join(map(str, told)) + " |", flush=True)
        return True


print("| step | itself | moving average | of the last tenth |\n|---|---|---|---|", flush=True)
CPQL.from_dataset(args.data, seed=args.seed, device="cpu", **OPTIONS).pretrain(args.steps, callback=Averages())
