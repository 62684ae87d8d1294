"""Small data, environments and models that all tests share. Tests never read data from outside the repository."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from sb3_consistency import CPQL, RACTD, DiffusionQL, registry
from sb3_consistency.algorithms.actor_critic import ActorCritic

ALGORITHMS = [registry.algorithm(name) for name in registry.ALGORITHMS]
ACTOR_CRITICS = [cls for cls in ALGORITHMS if issubclass(cls, ActorCritic)]


class Distilled(CPQL):
    """CPQL with a teacher beside the actor: other networks, and other losses."""

    bc_loss = "distill"
    target_candidates = 3


SMALL = {"policy_kwargs": {"net_arch": [32, 32]}, "batch_size": 32, "seed": 0, "device": "cpu"}
#: of a model that learns online soon
ONLINE = {**SMALL, "learning_starts": 4, "buffer_size": 200}
VARIANTS = [
    (CPQL, {"value_mode": "iql"}),
    (CPQL, {"bc_loss": "distill", "target_noise": 0.5}),
    (CPQL, {"bc_loss": "distill", "distill_teacher": "consistency", "target_candidates": 1}),
    (DiffusionQL, {"sampling_steps": 2, "sampler": "ddim"}),
]
MODES = [*((cls, {}) for cls in ALGORITHMS), *VARIANTS]

every = pytest.mark.parametrize("cls", [*ALGORITHMS, Distilled])
actor_critics = pytest.mark.parametrize("cls", [*ACTOR_CRITICS, Distilled])


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


# models


def box_env(**kwargs):
    return VectorEnv(action_space=spaces.Box(-1, 1, (1,), np.float32), **kwargs)


def make(cls, env=None, policy="MlpPolicy", **kwargs):
    """A model with data loaded and an environment."""
    model = cls(policy, env or box_env(), **{**SMALL, **kwargs})
    model.load_dataset(make_arrays())
    return model


def make_planner(env=None, arrays=None, **kwargs):
    model = RACTD("MlpPolicy", env or box_env(), **{**SMALL, **kwargs})
    model.load_dataset(make_arrays() if arrays is None else arrays)
    return model


def trained(cls, **kwargs):
    return make(cls, **kwargs).pretrain(5)


def loaded(cls, **kwargs):
    """A model with data loaded and no environment."""
    model = cls("MlpPolicy", dataset=make_arrays(), **{**SMALL, **kwargs})
    model.load_dataset(model.dataset)
    return model


def online(cls, env=None, policy="MlpPolicy", **kwargs):
    """A model without data that learns online soon."""
    return cls(policy, env or box_env(), **{**ONLINE, "learning_starts": 5, **kwargs})


def weights(model):
    return th.cat([p.detach().flatten() for p in model.policy.parameters()])


def leaves(tree):
    """The entries of nested dicts and sequences."""
    return th.utils._pytree.tree_leaves(tree)


def state_of(model):
    """Weights, moving averages and everything that the optimizers remember."""
    return {
        key: [x.clone() for x in leaves(value) if isinstance(x, th.Tensor)] for key, value in model.get_parameters().items()
    }


def assert_equal_states(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert all(th.equal(x, y) for x, y in zip(a[key], b[key], strict=True)), key


def assert_same(a, b):
    """Equal weights, optimizer states and predictions."""
    for name, ours in a.get_parameters().items():
        for x, y in zip(leaves(ours), leaves(b.get_parameters()[name]), strict=True):
            assert th.equal(x, y) if isinstance(x, th.Tensor) else x == y, name
    obs = np.random.default_rng(0).uniform(-1, 1, (4, *a.observation_space.shape)).astype(np.float32)
    np.testing.assert_array_equal(a.predict(obs, deterministic=True)[0], b.predict(obs, deterministic=True)[0])


class Counter(BaseCallback):
    """Notes at which timesteps it was called, and stops the run at a call."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.stop_at = stop_at
        self.steps = []
        self.started = self.ended = 0

    def _on_training_start(self):
        self.started += 1

    def _on_step(self):
        self.steps.append(self.model.num_timesteps)
        return self.stop_at is None or len(self.steps) < self.stop_at

    def _on_training_end(self):
        self.ended += 1
