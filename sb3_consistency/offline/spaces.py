"""Spaces that were inferred from arrays, and those of an environment that take their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv

from sb3_consistency.offline.loading import is_normalised_space

REMEDY = (
    "make the model with env=..., or give it arrays with a {name!r} (an .npz file can't hold one: pass "
    "{{**numpy.load(path), {name!r}: ...}})."
)


def adopted_spaces(inferred: Mapping[str, Any], env: VecEnv) -> dict[str, spaces.Space]:
    """
    An environment's spaces, for a model whose own were inferred from arrays, which don't tell bounds and precision.

    :param inferred: "observation_space" or "action_space" or both -> the space that was inferred
    :param env: the environment, as SB3 wraps it
    :return: the environment's spaces of these names
    :raises ValueError: if they would make other networks, or give the actions another scale
    """
    for name, ours in inferred.items():
        theirs = getattr(env, name)
        if name == "observation_space" and not _same_networks(ours, theirs):
            raise ValueError(
                f"Observation spaces do not match: {ours} != {theirs}. The model's was inferred from arrays: "
                + REMEDY.format(name=name)
            )
        if name == "action_space" and not _same_scale(ours, theirs):
            raise ValueError(
                f"Action spaces do not match: {ours} != {theirs}. The model's was inferred from actions within [-1, 1], and "
                "the policy's would get another scale: " + REMEDY.format(name=name)
            )
    return {name: getattr(env, name) for name in inferred}


def _same_networks(ours: spaces.Space, theirs: spaces.Space) -> bool:
    """Whether networks for the one are networks for the other."""
    if isinstance(ours, spaces.Dict):
        # in the same order, too: the networks see the entries one after the other
        same_keys = isinstance(theirs, spaces.Dict) and list(ours) == list(theirs)
        return same_keys and all(_same_networks(ours[key], theirs[key]) for key in ours)  # type: ignore[index]
    kinds = [(type(s), s.shape, is_normalised_space(s), is_image_space(s)) for s in (ours, theirs)]
    return kinds[0] == kinds[1]


def _same_scale(ours: spaces.Box, theirs: spaces.Space) -> bool:
    same_shape = isinstance(theirs, spaces.Box) and ours.shape == theirs.shape
    return same_shape and np.allclose(ours.low, theirs.low) and np.allclose(ours.high, theirs.high)  # type: ignore[attr-defined]


def fitting_policy(space: spaces.Space) -> str:
    """
    :param space: observation space
    :return: name of the policy for it
    """
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"
