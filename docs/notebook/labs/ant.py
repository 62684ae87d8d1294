"""
What the deterministic policy does on Ant while it is trained: actions, parts of the reward, values against returns.

python docs/notebook/labs/ant.py CPQL "{'compile': True, 'policy_delay': 1}" --steps 20000 --every 2000
"""

import argparse
import ast

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

from sb3_consistency import CPQL

PARTS = ("reward_forward", "reward_ctrl", "reward_contact", "reward_survive")


class Look(BaseCallback):
    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every == 0:
            for seed in (0, 1):
                print(self.num_timesteps, seed, episode(self.model, seed), flush=True)
        return True


@th.no_grad()
def episode(model, seed: int) -> str:
    env = gym.make("Ant-v5")
    obs, _ = env.reset(seed=seed)
    rewards, actions, values, parts, over = [], [], [], dict.fromkeys(PARTS, 0.0), False
    while not over:
        action, _ = model.predict(obs, deterministic=True)
        q_values = model.critic(*(th.as_tensor(x, dtype=th.float32)[None] for x in (obs, action)))
        values.append(min(map(float, q_values)) if isinstance(q_values, tuple) else float(q_values.min()))
        obs, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        actions.append(action)
        parts = {name: parts[name] + float(info[name]) for name in PARTS}
        over = terminated or truncated
    returns = [0.0]
    for reward in rewards[::-1]:
        returns.append(reward + model.gamma * returns[-1])
    per_step = {name.removeprefix("reward_"): round(total / len(rewards), 2) for name, total in parts.items()}
    size = np.abs(actions).mean()
    return f"return {sum(rewards):.0f} steps {len(rewards)} |a| {size:.2f} {per_step} Q {np.mean(values):.0f} G {np.mean(returns[1:]):.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("algo", choices=["CPQL", "SAC"])
    parser.add_argument("options", type=ast.literal_eval, nargs="?", default={})
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=2_000)
    args = parser.parse_args()
    th.set_num_threads(1)
    cls = {"CPQL": CPQL, "SAC": SAC}[args.algo]
    cls("MlpPolicy", gym.make("Ant-v5"), seed=0, **args.options).learn(args.steps, callback=Look(args.every))
