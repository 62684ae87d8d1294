"""Statistics fitted from data are those of the data: no prior, no cancellation, a unit scale for what never varies."""

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_consistency import ConsistencyBC
from sb3_consistency.data.rewards import fit_reward_transform
from sb3_consistency.data.statistics import Moments, ObservationStatistics, fit_vec_normalize, running_returns
from tests.conftest import SMALL, VectorEnv, make_arrays


@given(
    blocks=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    mean=st.sampled_from([0.0, 1.0, -1e3, 1e6, 1e-4]),
    std=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_blocks_give_the_moments_of_the_whole(blocks, mean, std, seed):
    values = np.random.default_rng(seed).normal(mean, std, (sum(blocks), 2))
    moments = Moments((2,))
    for part in np.split(values, np.cumsum(blocks)[:-1]):
        moments.update(part)
    assert moments.count == len(values)
    np.testing.assert_allclose(moments.mean, values.mean(axis=0), rtol=1e-12, atol=1e-12)
    if len(values) > 1:
        smallest = np.maximum(1e-6, 2 * np.finfo(np.float32).eps * np.abs(values.mean(axis=0)))
        right = np.where(values.std(axis=0) > smallest, values.var(axis=0), 1)
        np.testing.assert_allclose(moments.var, right, rtol=1e-9)


@pytest.mark.parametrize("constant", [0.0, 1.0, -0.1, 1000.0, 1e6, 123.456])
def test_an_entry_that_never_varies_has_a_unit_scale(constant):
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(size=5000), np.full(5000, constant), constant + rng.normal(size=5000)], axis=1)
    values = values.astype(np.float32)
    statistics = ObservationStatistics(spaces.Box(-np.inf, np.inf, (3,), np.float32))
    for part in np.split(values, 10):
        statistics.update(part)
    assert statistics.std[""][1] == 1
    assert statistics.std[""][2] == pytest.approx(values[:, 2].astype(np.float64).std(), rel=1e-6)
    assert np.float32(statistics.mean[""][1]) == np.float32(constant)


@pytest.mark.parametrize("payload", [1000.0, 1e6])
def test_a_payload_that_demonstrations_never_vary_does_no_harm(payload):
    arrays = make_arrays(n_episodes=10)
    for key in ("observations", "next_observations"):
        arrays[key][:, 1] = payload
    model = ConsistencyBC("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), **SMALL)
    model.load_dataset(arrays)
    entry = model.policy.actor.obs_normalizer.entries["entry0"]
    assert entry.std[1] == 1 and entry.mean[1] == payload
    observation = arrays["observations"][:50].copy()
    model.pretrain(100)
    before = model.predict(observation, deterministic=True)[0]
    observation[:, 1] += 0.1
    assert np.abs(model.predict(observation, deterministic=True)[0] - before).mean() < 0.1


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6])
def test_normalized_rewards_that_never_vary_are_zero(constant):
    rewards = np.full((400, 2), constant, np.float32)
    transform = fit_reward_transform("normalize", rewards, rewards.sum(axis=0))
    assert np.abs(transform(rewards)).max() < 1e-6 and np.abs(transform(rewards + 1) - 1).max() < 0.1
    varied = rewards + np.random.default_rng(0).normal(size=rewards.shape).astype(np.float32)
    scaled = fit_reward_transform("normalize", varied, varied.sum(axis=0))(varied)
    assert scaled.mean() == pytest.approx(0, abs=1e-5) and scaled.std() == pytest.approx(1, rel=1e-5)


def normalised(**kwargs):
    return VecNormalize(make_vec_env(lambda: VectorEnv(action_space=spaces.Box(-1, 1, (1,)))), gamma=0.9, **kwargs)


def test_vec_normalize_gets_the_data_without_its_prior():
    env = normalised()
    observations = np.random.default_rng(0).normal([0, 1000, -5], [1, 0, 2], (30, 3)).astype(np.float32)
    rewards, dones = np.arange(30.0)[:, None], (np.arange(30) % 10 == 9)[:, None].astype(float)
    statistics = ObservationStatistics(env.observation_space)
    statistics.update(observations)
    fit_vec_normalize(env, statistics, rewards, dones)
    exact = observations.astype(np.float64)
    np.testing.assert_allclose(env.obs_rms.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(env.obs_rms.var, np.where([True, False, True], exact.var(axis=0), 1), rtol=1e-12)
    returns = running_returns(rewards[:, 0], dones[:, 0], 0.9)
    assert returns[9] == pytest.approx(sum(0.9 ** (9 - t) * t for t in range(10))) and returns[10] == 10
    assert env.ret_rms.var == pytest.approx(returns.var(), rel=1e-12)
    # other data is added to what it has seen
    fit_vec_normalize(env, statistics, rewards, dones)
    assert env.obs_rms.count == 60
    np.testing.assert_allclose(env.obs_rms.mean, exact.mean(axis=0), rtol=1e-12)


def test_the_prior_that_would_leak_in():
    """What the tests above guard against: SB3's running mean starts as a ten-thousandth of a sample at 0."""
    running = RunningMeanStd(shape=())
    running.update(np.full(5000, 1000.0))
    assert np.sqrt(running.var) > 0.01


def test_the_cost_of_loading_is_one_per_row():
    import time

    def seconds(length, n=100_000):
        observations = np.random.default_rng(0).normal(size=(n + 1, 3)).astype(np.float32)
        ends = np.arange(n) % length == length - 1
        data = {"observations": observations[:-1], "next_observations": observations[1:], "actions": np.zeros((n, 1))}
        model = ConsistencyBC("MlpPolicy", VectorEnv(action_space=spaces.Box(-1, 1, (1,))), **SMALL)
        start = time.perf_counter()
        model.load_dataset({**data, "rewards": np.zeros(n), "terminations": ends})
        return time.perf_counter() - start

    seconds(1000)
    assert min(seconds(1), seconds(1)) < 10 * max(seconds(1000), seconds(1000)) + 0.2  # one a time, 300 times as long
