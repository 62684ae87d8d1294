"""An episode that a new start cuts is marked in the buffer: no return, goal or window reaches across the cut."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_consistency import CPQL, DatasetError


class Count(gym.Env):
    """The observation is 1000 * episode + step; an episode takes 100 steps, and a step may fail."""

    observation_space = spaces.Box(0, 1e6, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    episode, fails_at = 0, None

    def reset(self, *, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        return np.array([1000.0 * self.episode], np.float32), {}

    def step(self, action):
        self.t += 1
        if self.t == self.fails_at:
            self.fails_at = None
            raise KeyboardInterrupt
        return np.array([1000.0 * self.episode + self.t], np.float32), 1.0, False, self.t >= 100, {}


class Stop(BaseCallback):
    def _on_step(self) -> bool:
        return self.n_calls < 17


def again(model):
    model.learn(30)


def continued_after_a_stop(model):
    model.learn(30, callback=Stop(), reset_num_timesteps=False)
    model.learn(30, reset_num_timesteps=False)


def interrupted(model):
    env = model.env.envs[0].unwrapped
    env.fails_at = env.t + 5
    with pytest.raises(KeyboardInterrupt):
        model.learn(30, reset_num_timesteps=False)
    model.learn(30, reset_num_timesteps=False)


def another_environment(model):
    env = Count()
    env.episode = 50
    model.set_env(env)
    model.learn(30, reset_num_timesteps=False)


def kept_on(model):
    model.learn(30, reset_num_timesteps=False)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("go_on", [again, continued_after_a_stop, interrupted, another_environment, kept_on])
def test_n_step_returns_stay_in_their_episode(go_on, n_envs):
    if n_envs > 1 and go_on is another_environment:
        pytest.skip("the number of environments can't change")
    env = DummyVecEnv([Count for _ in range(n_envs)])
    model = CPQL("MlpPolicy", env, n_steps=5, gamma=1.0, learning_starts=10**6, buffer_size=1000)
    model.learn(30)
    go_on(model)
    data = model.replay_buffer._get_samples(np.arange(model.replay_buffer.pos - 6))
    steps = (data.next_observations - data.observations)[:, 0]
    assert ((steps >= 1) & (steps <= 5)).all()
    np.testing.assert_array_equal(data.rewards[:, 0], steps)  # a reward of 1 for every step that was really taken


def test_goals_in_hindsight_are_of_the_same_episode():
    env = BitFlippingEnv(n_bits=7, continuous=True, max_steps=7)
    small = {"learning_starts": 20, "buffer_size": 300, "batch_size": 16, "policy_kwargs": {"net_arch": [16]}}
    model = CPQL("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, **small)
    model.learn(33)
    model.learn(33)
    assert model.replay_buffer.ep_length.max() <= 7


def test_a_buffer_that_is_loaded_is_cut_where_the_new_run_starts(tmp_path):
    model = CPQL("MlpPolicy", Count(), n_steps=5, learning_starts=10**6, buffer_size=1000)
    model.learn(30)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = CPQL.load(tmp_path / "model", env=Count())
    loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    loaded.learn(30, reset_num_timesteps=False)
    data = loaded.replay_buffer._get_samples(np.arange(50))
    assert ((data.next_observations - data.observations)[:, 0] <= 5).all()


@pytest.mark.parametrize("n_envs", [1, 2])
def test_noise_and_buffers_of_another_number_of_environments(n_envs, tmp_path):
    noise = NormalActionNoise(np.zeros(1), np.full(1, 0.1))
    small = {"learning_starts": 20, "buffer_size": 500, "batch_size": 16, "policy_kwargs": {"net_arch": [16]}}
    model = CPQL("MlpPolicy", make_vec_env("Pendulum-v1", n_envs=3), action_noise=noise, **small)
    model.learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    loaded = CPQL.load(tmp_path / "model", env=make_vec_env("Pendulum-v1", n_envs=n_envs))
    before = loaded.replay_buffer
    with pytest.raises(DatasetError, match=rf"a buffer of 3 environment\(s\), the model has {n_envs}: .*load_dataset\("):
        loaded.load_replay_buffer(tmp_path / "buffer.pkl")
    assert loaded.replay_buffer is before
    loaded.learn(40)
