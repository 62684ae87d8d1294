# %% [markdown]
"""
# Demonstrations that pause

Clone demonstrations that pause: step by step, by chunks of actions, and with a history of observations.

Who pauses for four steps sees the same five times, and moves on once: a policy that chooses step by step does it by chance.
"""

# %%
import argparse
import sys

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_consistency import ConsistencyBC

ABOUT = "Clone demonstrations that pause: step by step, by chunks of actions, and with a history of observations."
parser = argparse.ArgumentParser(description=ABOUT, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--steps", type=int, default=600, help="gradient steps of every policy")
parser.add_argument("--episodes", type=int, default=100, help="episodes of every policy")
parser.add_argument("--pause", type=int, default=4, help="steps that the demonstrations pause for")
args = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has the defaults

# %% [markdown]
# ## The environment and the demonstrations


# %%
class Pause(gym.Env):
    """Move from 0 to 1, pause, move on to 2 and 3. The observation is the position alone: not how long one has paused."""

    observation_space = spaces.Box(0, 3, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = self.position = self.paused = 0
        return np.array([self.position], np.float32), {}

    def step(self, action):
        moves = bool(action[0] > 0)
        self.paused += self.position == 1 and not moves
        self.position += moves
        self.t += 1
        return np.array([self.position], np.float32), 0.0, self.position == 3, self.t == 100, {}


one = {
    "observations": [0, *(args.pause + 1) * [1], 2],
    "actions": [1, *args.pause * [-1], 1, 1],
    "terminations": [*(args.pause + 2) * [False], True],
}
data = {key: np.tile(values, 20) for key, values in one.items()}
data |= {key: data[key].astype(np.float32)[:, None] for key in ("observations", "actions")}
p = 1 / (args.pause + 1)
share = p * (1 - p) ** args.pause
print(f"One action in {args.pause + 1} moves on: step by step, {share:.0%} of the pauses are as long as shown.")

# %% [markdown]
# ## Four policies
#
# `predict` returns the memory of the chunk or the history; it is given back with the next observation.


# %%
def pauses(model: ConsistencyBC, n: int, deterministic: bool) -> np.ndarray:
    """Steps that each of n episodes paused for."""
    env, found = Pause(), []
    for _ in range(n):
        (observation, _), state, done = env.reset(), None, False
        while not done:
            action, state = model.predict(observation, state, np.array([env.t == 0]), deterministic)
            observation, _, terminated, truncated, _ = env.step(action)
            done = terminated or truncated
        found.append(env.paused)
    return np.array(found)


length = args.pause + 3
policies = {
    "step by step": {},
    f"chunks of {length}": {"horizon": length},
    f"chunks of {length}, a new one at every step": {"horizon": length, "executed_steps": 1},
    f"a history of {args.pause + 2}": {"history": args.pause + 2},
}
print("| policy | pauses as long as shown | longest pause | acting deterministically |\n|---|---|---|---|")
for name, options in policies.items():
    model = ConsistencyBC("MlpPolicy", Pause(), batch_size=64, seed=0, policy_kwargs={"net_arch": [64, 64]}, **options)
    model.load_dataset(data)
    model.learn(args.steps)
    found, alone = pauses(model, args.episodes, deterministic=False), pauses(model, 1, deterministic=True)[0]
    told = "for ever" if alone > 90 else f"{alone} steps"
    print(f"| {name} | {np.mean(found == args.pause):.0%} | {found.max()} steps | {told} |", flush=True)
