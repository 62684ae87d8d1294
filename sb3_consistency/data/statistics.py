"""Statistics of the data: mean and deviation of observations and returns, in float64 and without a prior."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecNormalize

from sb3_consistency.envs.spaces import is_normalised_space

#: an entry whose deviation is smaller than this, or than the rounding of float32 at its mean, does not vary
SMALLEST_STD = 1e-6


class Moments:
    """
    Mean and variance of a stream of arrays.

    Source: Chan, Golub and LeVeque 1979, equations 2.1: blocks are summed about their own mean and then joined, so that a
    large mean does not cancel a small variance.

    :param shape: shape of an entry
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0
        self.mean = np.zeros(shape)
        self._squares = np.zeros(shape)

    def update(self, values: np.ndarray) -> None:
        """
        :param values: entries, (T, *shape)
        """
        values = values.astype(np.float64)
        n = len(values)
        if n == 0:
            return
        mean = values.mean(axis=0)
        delta = mean - self.mean
        total = self.count + n
        self._squares += np.square(values - mean).sum(axis=0) + np.square(delta) * self.count * n / total
        self.mean = self.mean + delta * n / total
        self.count = total

    @property
    def var(self) -> np.ndarray:
        """Variance, (*shape); 1 where entries hardly vary: dividing by less would blow up what is noise or unseen."""
        var = self._squares / max(1, self.count)
        smallest = np.maximum(SMALLEST_STD, 2 * np.finfo(np.float32).eps * np.abs(self.mean))
        return np.where(var > np.square(smallest), var, 1.0)


class ObservationStatistics:
    """
    Mean and standard deviation of the continuous entries of observations.

    :param observation_space: observation space of the model
    """

    def __init__(self, observation_space: spaces.Space) -> None:
        entries = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        self.running = {key: Moments(space.shape or ()) for key, space in entries.items() if is_normalised_space(space)}

    def update(self, observations: Any) -> None:
        """
        :param observations: array (T, ...) or a dict of them
        """
        for key, running in self.running.items():
            running.update(observations[key] if isinstance(observations, Mapping) else observations)

    @property
    def mean(self) -> dict[str, np.ndarray]:
        """Mean per key ("" for observations that are no dict)."""
        return {key: running.mean for key, running in self.running.items()}

    @property
    def std(self) -> dict[str, np.ndarray]:
        """Standard deviation per key; 1 for entries that hardly vary."""
        return {key: np.sqrt(running.var) for key, running in self.running.items()}


def fit_vec_normalize(
    vec_normalize: VecNormalize, statistics: ObservationStatistics, rewards: np.ndarray, dones: np.ndarray
) -> None:
    """
    Add the statistics of a dataset to those of VecNormalize; in the place of the initial ones, which are no data.

    :param vec_normalize: what will normalise the data, in training
    :param statistics: of the observations
    :param rewards: (rows, environments)
    :param dones: ends of episodes, (rows, environments)
    """
    if vec_normalize.norm_obs:
        obs_rms = vec_normalize.obs_rms
        for key, moments in statistics.running.items():
            # of a Dict, VecNormalize may keep statistics for some keys only
            target = obs_rms.get(key) if isinstance(obs_rms, dict) else obs_rms
            if target is not None:
                _add(target, moments)
    if vec_normalize.norm_reward:
        moments = Moments(())
        for column in range(rewards.shape[1]):
            moments.update(running_returns(rewards[:, column], dones[:, column], vec_normalize.gamma))
        _add(vec_normalize.ret_rms, moments)


def running_returns(rewards: np.ndarray, dones: np.ndarray, gamma: float) -> np.ndarray:
    """
    :param rewards: rewards in the order of time, (T,)
    :param dones: ends of episodes, (T,)
    :param gamma: discount factor
    :return: what VecNormalize divides by the deviation of: G_t = gamma G_(t-1) + r_t, from 0 after the end of an episode
    """
    previous_done = [1.0, *dones[:-1].tolist()]
    steps = zip(rewards.tolist(), previous_done, strict=True)
    sums = accumulate(steps, lambda total, step: total * gamma * (1 - step[1]) + step[0], initial=0.0)
    return np.array(list(sums)[1:])


def _add(target: RunningMeanStd, moments: Moments) -> None:
    if target.count < 1:  # SB3 starts with a mean of 0 and a variance of 1 that count as a ten-thousandth of a sample
        target.mean, target.var, target.count = np.array(moments.mean), np.array(moments.var), float(moments.count)
    else:
        target.update_from_moments(moments.mean, moments.var, moments.count)
