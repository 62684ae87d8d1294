"""Environments: ids, instances, vectors, wrappers, noise, goals."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import (
    EvalCallback,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_consistency import CPQL
from tests.conftest import SMALL, VectorEnv, actor_critics, assert_same, box_env, every, make_arrays, online, trained
from tests.test_loading import GoalEnv


@every
def test_environments_as_sb3_takes_them(cls):
    model = cls("MlpPolicy", "Pendulum-v1", **SMALL)
    assert isinstance(model.get_env(), DummyVecEnv) and model.n_envs == 1
    assert cls("MlpPolicy", gym.make("Pendulum-v1"), **SMALL).action_space.shape == (1,)
    with pytest.raises(gym.error.Error):
        cls("MlpPolicy", "NoSuchEnvironment-v0")


@every
def test_set_env(cls):
    model = trained(cls)
    env = box_env()
    model.set_env(env)
    assert model.get_env().envs[0].unwrapped is env
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env(box_env, n_envs=2))
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(VectorEnv())


def test_from_dataset_takes_an_environment_or_its_id():
    data = {**make_arrays(action_dim=1), "action_space": None}
    model = CPQL.from_dataset(data, env="Pendulum-v1", **SMALL)
    assert model.replay_buffer.size() == 120 and model.env.num_envs == 1


@actor_critics
def test_several_environments_vec_normalize_and_n_steps(cls, tmp_path):
    env = VecNormalize(make_vec_env(box_env, n_envs=2))
    model = cls("MlpPolicy", env, n_steps=3, learning_starts=10, **SMALL)
    model.load_dataset(make_arrays())
    model.pretrain(3)
    model.learn(40)
    model.save(tmp_path / "model")
    env.save(tmp_path / "vec_normalize.pkl")
    fresh = VecNormalize.load(tmp_path / "vec_normalize.pkl", make_vec_env(box_env, n_envs=2))
    cls.load(tmp_path / "model", env=fresh).learn(20)


@actor_critics
def test_vec_normalize_is_applied_once_and_synchronised(cls):
    env, eval_env = (VecNormalize(make_vec_env(box_env), training=training) for training in (True, False))
    model = online(cls, env)
    assert model.get_vec_normalize_env() is env
    model.learn(30, callback=EvalCallback(eval_env, n_eval_episodes=1, eval_freq=10, verbose=0))
    np.testing.assert_allclose(eval_env.obs_rms.mean, env.obs_rms.mean, atol=0.5)
    raw = model.replay_buffer.observations[:30]
    assert np.abs(raw).max() <= 1  # the buffer holds observations as the environment gave them
    batch = next(model.batches(1, 8))
    assert not np.isin(batch.observations[:, 0].numpy(), raw[..., 0]).any()  # and batches normalised ones


@actor_critics
@pytest.mark.parametrize("noise", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_action_noise(cls, noise, n_envs):
    env = make_vec_env(box_env, n_envs=n_envs)
    model = online(cls, env, action_noise=noise(np.zeros(1), 10 * np.ones(1))).learn(30)
    assert isinstance(model.action_noise, VectorizedActionNoise) == (n_envs > 1)
    actions = model.replay_buffer.actions[5 : model.replay_buffer.size()]
    assert np.abs(actions).max() <= 1 and (np.abs(actions) == 1).mean() > 0.5  # strong noise, clipped to the bounds


@actor_critics
@pytest.mark.parametrize(
    ("kwargs", "n_updates"),
    [
        ({"train_freq": 4, "gradient_steps": 2}, 6),
        ({"train_freq": (1, "episode"), "gradient_steps": -1}, 15),
        ({"train_freq": [1, "episode"], "gradient_steps": -1}, 15),
        ({"train_freq": 2, "gradient_steps": -1}, 14),
        ({"gradient_steps": 0}, 0),
    ],
)
def test_train_freq_and_gradient_steps(cls, kwargs, n_updates):
    model = online(cls, box_env(length=5), **kwargs).learn(20)
    assert model.num_timesteps == 20 and model.n_updates == pytest.approx(n_updates, abs=2)


def test_episodes_need_one_environment():
    model = online(CPQL, make_vec_env(box_env, n_envs=2), train_freq=(1, "episode"))
    with pytest.raises(AssertionError, match="episodic"):
        model.learn(10)


@actor_critics
@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_her_online(cls, strategy):
    kwargs = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"goal_selection_strategy": strategy}}
    model = online(cls, GoalEnv(), "MultiInputPolicy", learning_starts=12, **kwargs).learn(30)
    assert model.n_updates >= 15
    assert model.predict(GoalEnv().reset()[0], deterministic=True)[0].shape == (2,)


@actor_critics
def test_the_same_seed_online_gives_the_same_weights(cls):
    assert_same(online(cls).learn(40), online(cls).learn(40))


@actor_critics
@pytest.mark.parametrize("kwargs", [{}, {"train_freq": (1, "episode"), "gradient_steps": -1}, {"learning_starts": 15}])
def test_online_from_scratch(cls, kwargs):
    model = cls(
        "MlpPolicy", "Pendulum-v1", action_noise=NormalActionNoise(np.zeros(1), 0.1 * np.ones(1)), **{**SMALL, **kwargs}
    )
    model.learn(210)
    assert model.num_timesteps >= 210 and model.n_updates > 0
    model.learn(20, reset_num_timesteps=False)
    assert model.num_timesteps >= 230
