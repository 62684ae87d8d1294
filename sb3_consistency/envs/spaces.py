"""Spaces: which are supported, how actions are scaled, and which environment's may replace those inferred from arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import VecEnv

from sb3_consistency.envs.wrappers import flatten_nested, is_nested

REMEDY = (
    "make the model with env=..., or give it arrays with a {name!r} (an .npz file can't hold one: pass "
    "{{**numpy.load(path), {name!r}: ...}})."
)


class Bounds(NamedTuple):
    """Of a Box, in float64 and its shape: actions are middle + half_range x with x in [-1, 1]."""

    low: np.ndarray
    high: np.ndarray
    middle: np.ndarray
    half_range: np.ndarray


def action_bounds(space: spaces.Space) -> Bounds:
    """
    :param space: action space, a bounded Box
    :return: its bounds; float32 arithmetic would leave them by rounding, and the whole range may overflow
    """
    assert isinstance(space, spaces.Box)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return Bounds(low, high, low / 2 + high / 2, high / 2 - low / 2)


class UnsupportedSpaceError(ValueError, AssertionError):
    """A space that can't be learned with. (SB3 raises AssertionError here, its users catch either.)"""


def check_action_space(space: spaces.Space) -> None:
    """
    :param space: action space
    :raises UnsupportedSpaceError: if it is not a Box with finite bounds
    """
    if not isinstance(space, spaces.Box):
        raise UnsupportedSpaceError(f"env: only Box action spaces are supported, got {space}.")
    if not np.issubdtype(space.dtype, np.floating):
        raise UnsupportedSpaceError(
            f"env: only Boxes of floating-point numbers are supported as action spaces, got {space}; wrap the environment so "
            "that it rounds continuous actions itself."
        )
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise UnsupportedSpaceError(
            f"env: the action space needs finite bounds, got {space}; "
            "wrap the environment with gymnasium.wrappers.TransformAction into a bounded space."
        )
    if (action_bounds(space).half_range <= 0).any():  # that of neighbouring floats around 0 is 0, too
        raise UnsupportedSpaceError(f"env: every dimension of the action space needs low < high, got {space}.")


def check_observation_space(space: spaces.Space, optimize_memory_usage: bool = False) -> None:
    """
    :param space: observation space
    :param optimize_memory_usage: whether the replay buffer stores every observation once
    :raises UnsupportedSpaceError: if it has Discrete entries that don't start at 0, Boxes without a dimension, or images of
        both orders of channels: SB3 can't encode them
    :raises ValueError: if the memory-efficient buffer can't hold it
    """
    if optimize_memory_usage and isinstance(space, spaces.Dict):
        raise ValueError("optimize_memory_usage can't be used with Dict observations: DictReplayBuffer has no such mode.")
    entries = list(space.spaces.values()) if isinstance(space, spaces.Dict) else [space]
    channels_first = {is_image_space_channels_first(x) for x in entries if isinstance(x, spaces.Box) and is_image_space(x)}
    if len(channels_first) > 1:
        raise UnsupportedSpaceError(f"env: images must have their channels all first or all last, got {space}.")
    for entry in entries:
        if isinstance(entry, spaces.Box) and 0 in (*entry.shape, len(entry.shape)):
            raise UnsupportedSpaceError(f"env: observations need a shape with entries, got {entry}; use shape (1,).")
        if isinstance(entry, spaces.MultiDiscrete) and entry.nvec.ndim > 1:
            raise UnsupportedSpaceError(
                f"env: SB3 encodes MultiDiscrete observations of one dimension only, got {entry}; flatten it with "
                "gymnasium.wrappers.TransformObservation."
            )
        if isinstance(entry, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(entry.start):
            raise UnsupportedSpaceError(
                f"env: discrete observations must start at 0, got {entry}; subtract the start with "
                "gymnasium.wrappers.TransformObservation."
            )


def check_environment(env: Any) -> None:
    """
    :param env: argument of an algorithm, no string and not None
    :raises TypeError: if it is no environment; it says how to make one of it
    """
    if hasattr(env, "action_space") and hasattr(env, "observation_space"):
        several = hasattr(env, "possible_agents") or hasattr(env, "agents")
        if not (several and callable(env.action_space)):
            return
    if hasattr(env, "possible_agents") or hasattr(env, "agents"):
        remedy = "SB3 takes environments of one agent; make a vectorised environment of its agents (SuperSuit does)"
    elif isinstance(env, (list, tuple)):
        remedy = "several environments go into one: make_vec_env(...), or DummyVecEnv([lambda: ..., ...])"
    elif callable(env):
        remedy = "call it, or pass DummyVecEnv([function])"
    else:
        remedy = "pass a Gymnasium environment, its id, or a VecEnv"
    raise TypeError(f"env: {env!r} is no environment: {remedy}.")


def _shapes(space: spaces.Space) -> Any:
    return {key: s.shape for key, s in space.items()} if isinstance(space, spaces.Dict) else space.shape


def check_vec_normalize(env: VecEnv, vec_normalize: VecEnv | None) -> None:
    """
    :param env: environment, as SB3 wraps it
    :param vec_normalize: the ``VecNormalize`` in it, if there is one
    :raises ValueError: if what lies above it changes the observations: SB3 stores those that it saw last
    """
    if vec_normalize is None:
        return
    inner, outer = vec_normalize.observation_space, env.observation_space
    if isinstance(inner, spaces.Dict):
        same = isinstance(outer, spaces.Dict) and {k: s.shape for k, s in inner.items()} == {
            k: s.shape for k, s in outer.items()
        }
    else:
        same = inner.shape == outer.shape
    if not same:
        raise ValueError(
            f"env: VecNormalize must be the outermost wrapper, here it has {inner} and the model gets {outer}. Stack frames "
            "first (VecNormalize(VecFrameStack(...))), and give it images with their channels first "
            "(VecNormalize(VecTransposeImage(...)))."
        )


def check_observation(observation: Any) -> None:
    """
    :param observation: argument of ``predict``
    :raises ValueError: if it is all that Gymnasium's ``reset()`` returns, as in SB3's own ``predict``
    """
    if isinstance(observation, tuple) and len(observation) == 2 and isinstance(observation[1], dict):
        raise ValueError(
            "observation must be an array or a dict, got the tuple that Gymnasium's reset() returns: pass its first entry, "
            "as in obs, info = env.reset()."
        )


def check_n_envs(n_envs: int, **given: int) -> None:
    """
    :param n_envs: number of environments that an observation is of
    :param given: argument of ``predict`` -> number that it is of
    :raises ValueError: if they differ
    """
    for name, n in given.items():
        if n != n_envs:
            raise ValueError(
                f"{name} is of {n} environment(s), the observation of {n_envs}: with other environments start anew, with "
                "state=None."
            )


def flat_space(space: spaces.Space) -> spaces.Space:
    """
    :param space: an observation space
    :return: the space with nested Dicts flattened as :class:`FlattenNestedDict` does
    """
    if isinstance(space, spaces.Dict) and is_nested(space):
        return spaces.Dict(flatten_nested(space.spaces))
    return space


def channels_first_space(space: spaces.Space) -> spaces.Space:
    """
    :param space: an observation space
    :return: the space that SB3 gives it after moving image channels first
    """
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: channels_first_space(sub) for key, sub in space.spaces.items()})
    if isinstance(space, spaces.Box) and is_image_space(space) and not is_image_space_channels_first(space):
        return spaces.Box(space.low.transpose(2, 0, 1), space.high.transpose(2, 0, 1), dtype=space.dtype.type)
    return space


def is_normalised_space(space: spaces.Space) -> bool:
    """
    :param space: an observation space, not a Dict
    :return: whether its observations are normalised: continuous vectors are, images and discrete ones are not
    """
    return isinstance(space, spaces.Box) and not is_image_space(space) and np.issubdtype(space.dtype, np.floating)


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
