"""What the zoo takes from a dataset: the environment, its arguments, and its wrapper."""

from typing import Any

import gymnasium as gym

from sb3_consistency.data.opening import open_datasets
from sb3_consistency.envs.wrappers import is_nested

FLATTEN = "sb3_consistency.FlattenNestedDict"


def split_dataset(dataset: Any) -> Any:
    """
    :param dataset: a dataset, or several as "a,b"
    :return: the dataset, or a list of them
    """
    if not isinstance(dataset, str) or "," not in dataset:
        return dataset
    return [part.strip() for part in dataset.split(",") if part.strip()]


def dataset_key(dataset: Any) -> frozenset[str]:
    """
    :param dataset: a dataset or a list of them
    :return: its names, to compare it with the keys of a hyperparameter file
    """
    parts = split_dataset(dataset)
    return frozenset(map(str, parts)) if isinstance(parts, (list, tuple)) else frozenset([str(parts)])


def dataset_environment(dataset: Any) -> tuple[str, dict[str, Any]]:
    """
    :param dataset: a dataset or a list of them
    :return: id of its (evaluation) environment, and the arguments that differ from the registered ones
    :raises DatasetError: if the dataset can't be used or its environment can't be made
    :raises ValueError: if the dataset names no registered environment
    """
    env = open_datasets(dataset)[0].make_env(eval_env=True)
    spec = env.spec
    env.close()
    if spec is None or spec.id not in gym.registry:
        raise ValueError(
            f"dataset: the environment of {dataset!r} is not registered in Gymnasium "
            f"({None if spec is None else spec.id}); pass --env, and --gym-packages if a package registers it."
        )
    registered = gym.spec(spec.id)
    kwargs = {
        key: value
        for key, value in spec.kwargs.items()
        if repr(registered.kwargs.get(key)) != repr(value) and not (key == "render_mode" and value is None)
    }
    if spec.max_episode_steps != registered.max_episode_steps:
        kwargs["max_episode_steps"] = spec.max_episode_steps
    return spec.id, kwargs


def needs_flattening(env_id: str, env_kwargs: dict[str, Any]) -> bool:
    """
    :param env_id: id of a registered environment
    :param env_kwargs: its arguments
    :return: whether its observations are nested Dicts, which SB3 does not take
    """
    env = gym.make(env_id, **env_kwargs)
    env.close()
    return is_nested(env.observation_space)
