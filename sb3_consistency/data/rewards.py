"""Reward transforms: fitted on the offline data, applied to it and to every reward that comes online."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sb3_consistency.data.statistics import Moments

RewardFunction = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class AffineReward:
    """The transform ``scale * r + shift``."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, rewards: np.ndarray) -> np.ndarray:
        # in float64: of large rewards that hardly vary, float32 would leave the rounding errors
        return (self.scale * np.asarray(rewards, np.float64) + self.shift).astype(np.float32)


REWARD_TRANSFORMS = ("none", "normalize", "antmaze", "minus_one", "iql_locomotion")


def fit_reward_transform(transform: str | RewardFunction, rewards: np.ndarray, returns: np.ndarray) -> RewardFunction | None:
    """
    :param transform: "none"; "normalize" (standardised rewards); "antmaze" 4 (r - 0.5); "minus_one" r - 1;
        "iql_locomotion" 1000 r / (highest - lowest return of the episodes); or a function of an array of rewards
    :param rewards: all rewards of the dataset
    :param returns: returns of its episodes
    :return: the function to apply, None for "none"
    :raises ValueError: if the name is unknown
    """
    if callable(transform):
        return transform
    if transform == "none":
        return None
    if transform == "normalize":
        moments = Moments(())
        moments.update(rewards.reshape(-1))
        std = float(np.sqrt(moments.var))
        return AffineReward(1 / std, -float(moments.mean) / std)
    if transform == "antmaze":
        return AffineReward(4.0, -2.0)
    if transform == "minus_one":
        return AffineReward(1.0, -1.0)
    if transform == "iql_locomotion":
        spread = float(returns.max() - returns.min())
        if spread < 1e-6:
            raise ValueError("reward_transform='iql_locomotion' divides by the spread of the returns: here all are equal.")
        return AffineReward(1000 / spread)
    raise ValueError(f"reward_transform must be a function or one of {list(REWARD_TRANSFORMS)}, got {transform!r}.")
