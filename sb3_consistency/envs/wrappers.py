"""SB3 takes no nested Dict observations: the wrapper that flattens them, for environments and datasets alike."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
from gymnasium import spaces


def flatten_nested(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """
    Flatten nested dicts (or Dict spaces) to one level, joining the keys with "/".

    :param value: nested mapping
    :return: {"achieved_goal/kettle": ..., ...}, in the order of the mapping
    """
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        if isinstance(entry, (Mapping, spaces.Dict)):
            flat.update(flatten_nested(entry, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = entry
    return flat


def is_nested(space: spaces.Space) -> bool:
    """
    :param space: an observation space
    :return: whether it is a Dict with a Dict inside
    """
    return isinstance(space, spaces.Dict) and any(isinstance(s, spaces.Dict) for s in space.spaces.values())


class FlattenNestedDict(gym.ObservationWrapper):
    """
    Flatten nested Dict observations (FrankaKitchen's goals, for one) to one level; keys are joined with "/".

    :meth:`load_dataset` flattens the observations of a dataset in the same way.

    :param env: environment with Dict observations
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Dict)
        self.observation_space = spaces.Dict(flatten_nested(env.observation_space.spaces))

    def observation(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        return flatten_nested(observation)


def flatten_if_nested(env: gym.Env) -> gym.Env:
    """
    :param env: any environment
    :return: the environment, wrapped in :class:`FlattenNestedDict` if its observations are nested
    """
    return FlattenNestedDict(env) if is_nested(env.observation_space) else env


class SpacesOnlyEnv(gym.Env):
    """
    Stands in for the environment of a model that has none: it has spaces and can't be reset or stepped.

    :param observation_space: observation space
    :param action_space: action space
    """

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, **kwargs: Any) -> Any:
        raise RuntimeError("The model has no environment to collect experience in: call set_env(...) first.")

    def step(self, action: Any) -> Any:
        return self.reset()


def make_known(env_id: str) -> None:
    """
    Register Gymnasium-Robotics' environments, which exist only once the package is imported, if the id may be one of theirs.

    :param env_id: id of an environment
    """
    if env_id not in gym.registry:
        try:
            import gymnasium_robotics
        except ImportError:
            return
        gym.register_envs(gymnasium_robotics)


def make_env(env: gym.Env | str, **kwargs: Any) -> gym.Env:
    """
    An environment as the models of this package take it.

    :param env: an environment, or the id of a registered one or of one of Gymnasium-Robotics
    :param kwargs: arguments of the environment of that id
    :return: the environment; nested observations are flattened
    :raises gymnasium.error.Error: if there is none of this id
    """
    if isinstance(env, str):
        make_known(env)
        env = gym.make(env, **kwargs)
    return flatten_if_nested(env)
