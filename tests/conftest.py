"""Small data and environments that all tests share. Tests never read data from outside the repository."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_consistency import CPQL, RACTD, ConsistencyAC, ConsistencyBC, DiffusionBC, DiffusionQL

ALGORITHMS = [ConsistencyBC, ConsistencyAC, CPQL, DiffusionBC, DiffusionQL, RACTD]
ACTOR_CRITICS = [ConsistencyAC, CPQL, DiffusionQL]
SMALL = {"policy_kwargs": {"net_arch": [32, 32]}, "batch_size": 32, "seed": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def _one_thread():
    th.set_num_threads(1)


class FixedNetwork(th.nn.Module):
    """Base of stand-ins for a model's network with a known output."""

    def at_levels(self, levels, cond):
        return lambda x, i, scale: self(scale * x, th.tensor(levels[i : i + 1], dtype=x.dtype), cond)


def make_arrays(n_episodes=6, length=20, obs_dim=3, action_dim=1, seed=0, terminal_every=2):
    """Episodes that follow s' = s + 1 in the first coordinate; every second one terminates, the others time out."""
    rng = np.random.default_rng(seed)
    arrays = {key: [] for key in ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")}
    for episode in range(n_episodes):
        obs = rng.uniform(-1, 1, size=(length + 1, obs_dim)).astype(np.float32)
        obs[:, 0] = 1000 * episode + np.arange(length + 1)
        ends = np.zeros(length, bool)
        ends[-1] = True
        terminal = episode % terminal_every == 0
        arrays["observations"].append(obs[:-1])
        arrays["next_observations"].append(obs[1:])
        arrays["actions"].append(rng.uniform(-1, 1, size=(length, action_dim)).astype(np.float32))
        arrays["rewards"].append(np.full(length, float(episode), np.float32))
        arrays["terminations"].append(ends & terminal)
        arrays["truncations"].append(ends & (not terminal))
    return {key: np.concatenate(parts) for key, parts in arrays.items()}


@pytest.fixture
def arrays():
    return make_arrays()


@pytest.fixture
def pendulum_arrays():
    data = make_arrays()
    data["action_space"] = spaces.Box(-2.0, 2.0, (1,), np.float32)
    return data


class VectorEnv(gym.Env):
    """Reward is highest for the action that equals the first observation; spaces by parameter."""

    def __init__(self, observation_space=None, action_space=None, length=10):
        self.observation_space = observation_space or spaces.Box(-1, 1, (3,), np.float32)
        self.action_space = action_space or spaces.Box(-1, 1, (2,), np.float32)
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        assert self.action_space.contains(np.asarray(action, dtype=self.action_space.dtype)), action
        reward = -float(np.square(action).mean())
        return self.observation_space.sample(), reward, False, self.t >= self.length, {}


@pytest.fixture
def minari_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"
