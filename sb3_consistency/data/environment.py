"""Whether a dataset was recorded in the environment that a model acts in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from sb3_consistency.data.episodes import EpisodeSource

#: arguments that change nothing of what a step does
COSMETIC = ("render_mode", "width", "height", "camera_id", "camera_name", "default_camera_config", "max_episode_steps")


def environment_differs(source: EpisodeSource, env: Any) -> str | None:
    """
    Compare the environment that a dataset names with a model's: equal spaces don't tell a Hopper of other rewards, or
    another maze, apart.

    :param source: the dataset
    :param env: Gymnasium environment or SB3 VecEnv; None for a model without one
    :return: a warning that names both, or None if they agree or either is not known
    """
    ours, theirs = _spec(env), source.env_specs
    if ours is None or not theirs:
        return None
    if any(_id(spec) == _id(ours) and not _differences(spec, ours) for spec in theirs):
        return None
    recorded = theirs[0]
    if _id(recorded) == _id(ours):
        what = "; ".join(f"{key}={a!r} there, {b!r} here" for key, a, b in _differences(recorded, ours))
        what = f"{recorded.id} with other arguments than the model's: {what}"
    else:
        what = f"{recorded.id}, the model acts in {ours.id}"
    return f"{source.name} was recorded in {what}. Rewards and dynamics may differ."


def _spec(env: Any) -> Any:
    if env is None:
        return None
    if hasattr(env, "get_attr"):
        try:
            return env.get_attr("spec", [0])[0]
        except AttributeError:
            return None
    return getattr(env, "spec", None)


def _id(spec: Any) -> str:
    """Without a module in front ("package:Name-v0")."""
    return str(spec.id).rpartition(":")[2]


def _differences(theirs: Any, ours: Any) -> list[tuple[str, Any, Any]]:
    both = [{**_registered(spec), **spec.kwargs} for spec in (theirs, ours)]
    keys = sorted(set(both[0]) | set(both[1]))
    pairs = [(key, both[0].get(key, "its default"), both[1].get(key, "its default")) for key in keys if key not in COSMETIC]
    return [pair for pair in pairs if not _equal(*pair[1:])]


def _registered(spec: Any) -> dict[str, Any]:
    """Arguments that an environment has without being told: those of its class, and those it is registered with."""
    import gymnasium as gym
    from gymnasium.envs.registration import load_env_creator

    entry_point = spec.entry_point
    parameters: Mapping[str, inspect.Parameter] = {}
    try:
        creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
        parameters = inspect.signature(creator).parameters
    except Exception:  # a package that is not installed, a class without a signature
        pass
    defaults = {key: value.default for key, value in parameters.items() if value.default is not value.empty}
    return {**defaults, **(gym.registry[spec.id].kwargs if spec.id in gym.registry else {})}


def _equal(a: Any, b: Any) -> bool:
    """A spec that went through JSON has lists in the place of tuples and arrays."""
    a, b = (value.tolist() if isinstance(value, np.ndarray) else value for value in (a, b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a == b) or repr(a) == repr(b)
