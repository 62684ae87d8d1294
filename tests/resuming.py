"""Runs that are killed and continued, for the tests of resuming."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_consistency import (
    CPQL,
    ResumableCheckpointCallback,
    load_latest,
)
from tests.conftest import VectorEnv, leaves, make_arrays

# few candidates to act by, for speed
FEW = {"n_candidates": 4}


TINY = {"policy_kwargs": {"net_arch": [16]}, "batch_size": 16, "seed": 0, "device": "cpu"}


class KilledError(Exception):
    """The process is gone."""


class Kill(BaseCallback):
    def __init__(self, at, online=None):
        super().__init__()
        self.at, self.online = at, online

    def _on_step(self):
        if self.online in (None, not self.model.in_offline_phase) and self.model.num_timesteps >= self.at:
            raise KilledError
        return True


def state_of(model):
    """All that the future of a run depends on, as leaves; to be asked for as soon as the run is over."""
    buffers = [b for b in (model.replay_buffer, model.offline_buffer) if b is not None]
    arrays = [vars(b)[name] for b in buffers for name in ("observations", "actions", "rewards", "dones", "pos")]
    norm = model.get_vec_normalize_env()
    statistics = [] if norm is None else [norm.obs_rms.mean, norm.obs_rms.var, norm.ret_rms.var, norm.returns]
    counters = [model.num_timesteps, model.n_updates, model._episode_num, model._total_timesteps, model.run.curriculum_end]
    draws = [random.random(), np.random.rand(), th.rand(1), model.action_space.sample()]
    tree = [model.get_parameters(), arrays, statistics, model._last_obs, counters, draws]
    return [np.asarray(leaf) for leaf in leaves(tree)]


def assert_equal(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(x, y)


def scramble():
    """A new process has other random states."""
    random.seed(99)
    np.random.seed(99)
    th.manual_seed(99)


def check(folder, make, run, kills, env=lambda: None, save_freq=20):
    """
    Compare a run with ones that are killed and continued.

    ``make(env)`` builds the model, ``run(model, callback)`` trains it, ``env()`` makes the environment; ``kills`` are
    timesteps, or (timestep, whether it is the online phase's).
    """
    uninterrupted = make(env())
    run(uninterrupted, None)
    reference = state_of(uninterrupted)
    for kill in kills:
        place = folder / str(kill)
        with pytest.raises(KilledError):
            run(make(env()), [ResumableCheckpointCallback(place, save_freq), Kill(*np.atleast_1d(kill))])
        scramble()
        model = load_latest(place, env=env())
        scramble()
        assert model.n_updates < uninterrupted.n_updates
        model.resume(ResumableCheckpointCallback(place, save_freq))
        assert_equal(state_of(model), reference)
    return model


def offline_model(cls, **kwargs):
    def make(env):
        model = cls("MlpPolicy", env, dataset=make_arrays(), dataset_kwargs={"heldout_fraction": 0.2}, **{**TINY, **kwargs})
        model.data.load_of_constructor()
        return model

    return make


def pretrain(model, callback):
    model.pretrain(140, callback=callback, log_interval=50)


def pendulum(n_envs=1):
    return lambda: make_vec_env("Pendulum-v1", n_envs=n_envs, seed=3)


def online_model(**kwargs):
    kwargs = {**TINY, **FEW, "learning_starts": 30, "buffer_size": 1000, "train_freq": 2, **kwargs}
    return lambda env: CPQL("MlpPolicy", env, **kwargs)


def learn(model, callback):
    model.learn(120, callback=callback)


def killed_run(folder, keep=2, at=119, env=VectorEnv):
    model = online_model()(env())
    with pytest.raises(KilledError):
        learn(model, [ResumableCheckpointCallback(folder, 20, keep=keep), Kill(at)])
    return model


def checkpoints(folder):
    return sorted(p.name for p in Path(folder).iterdir())
